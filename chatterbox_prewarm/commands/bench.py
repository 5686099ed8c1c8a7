"""bench: what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_place,
    device_option,
    say,
    warm_option,
    weights_option,
    write_result,
)
from chatterbox_prewarm.profiles import PROFILES


@click.group()
def bench() -> None:
    """Measure; every figure is a ratio of one run."""


@bench.command("startup")
@weights_option
@warm_option
@device_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each system.")
@click.option("--cold-pages", is_flag=True, help="Besides, one round with the page cache dropped (needs root).")
@click.option("--systems", default="torch,upstream,cold,warm", show_default=True, help="Which ones, in turn.")
def bench_startup(
    *, weights: Path, warm: Path, device: str, output: Path, rounds: int, cold_pages: bool, systems: str
) -> None:
    """Time starts in fresh processes, in turn: bare torch, upstream as it is, ours cold, ours warm."""
    from chatterbox_prewarm.bench.startup import run, table

    check_place(output)
    report = run(
        weights, warm, rounds=rounds, cold_pages=cold_pages, systems=systems.split(","), device=device, say=say
    )
    write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@bench.command("profiles")
@weights_option
@cache_option
@device_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each.")
@click.option("--profiles", default=",".join(PROFILES), show_default=True, help="Which ones, in turn.")
def bench_profiles(*, weights: Path, cache: Path, device: str, output: Path, rounds: int, profiles: str) -> None:
    """Bake each profile, then time fresh processes of each in turn, beside upstream."""
    from chatterbox_prewarm.bench.profiles import run, table

    check_place(output)
    report = run(weights, cache=cache, device=device, profiles=profiles.split(","), rounds=rounds, say=say)
    write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@bench.command("image")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--size", default="full", show_default=True, type=click.Choice(["full", "mini"]), help="Of the weights.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
def bench_image(*, output: Path, size: str, checkout: Path) -> None:
    """Build and prove an image with random weights, then again after a change of one Python file."""
    from chatterbox_prewarm.bench.image import run

    check_place(output)
    report = run(checkout, size=size, say=say)
    write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    again = report["after a change"]
    click.echo(f"after a change of {report['changed']}: {again['build_seconds']} s, {len(again['steps'])} steps ran:")
    for step in again["steps"]:
        click.echo(f"  {step}")


@bench.command("append")
@warm_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--gigabytes", default=9, show_default=True, type=click.IntRange(1), help="Of the image appended to.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes.")
def bench_append(*, warm: Path, output: Path, gigabytes: int, rounds: int) -> None:
    """Add a warm state to a large image in a registry on this machine: seconds, memory, and what is sent."""
    from chatterbox_prewarm.bench.append import run, table

    check_place(output)
    report = run(warm, gigabytes=gigabytes, rounds=rounds, say=say)
    write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@bench.command("routes")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
def bench_routes(*, output: Path, checkout: Path) -> None:
    """Bring one state into an image by every route that needs no GPU, prove each, and compare their warm layers."""
    from chatterbox_prewarm.bench.routes import run, table

    check_place(output)
    report = run(checkout, say=say)
    write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
