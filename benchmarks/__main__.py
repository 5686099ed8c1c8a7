"""The developers' benchmarks: `python -m benchmarks COMMAND`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import click

from chatterbox_prewarm.commands.bench import numbers, seeds_option, tokens_option, voice_option
from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_place,
    device_option,
    say,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError, ModelError, exit_with_code
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.system.atomic_files import write_whole


@click.group()
def benchmarks() -> None:
    """Measure this project while you change it. All figures of a report come from one run."""


@benchmarks.command("profiles")
@weights_option
@cache_option
@device_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each.")
@click.option("--profiles", default=",".join(PROFILES), show_default=True, help="Which ones, in turn.")
def profiles(*, weights: Path, cache: Path, device: str, output: Path, rounds: int, profiles: str) -> None:
    """Bake each profile, then time fresh processes of each in turn, beside upstream."""
    from benchmarks.profiles import run, table

    check_place(output)
    report = run(weights, cache=cache, device=device, profiles=profiles.split(","), rounds=rounds, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@benchmarks.command("image")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--size", default="full", show_default=True, type=click.Choice(["full", "mini"]), help="Of the weights.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
def image(*, output: Path, size: str, checkout: Path) -> None:
    """Build and prove an image with random weights, then again after a change of one Python file."""
    from benchmarks.image import run

    check_place(output)
    report = run(checkout, size=size, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    again = report["after a change"]
    click.echo(f"after a change of {report['changed']}: {again['build_seconds']} s, {len(again['steps'])} steps ran:")
    for step in again["steps"]:
        click.echo(f"  {step}")


@benchmarks.command("append")
@warm_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--gigabytes", default=9, show_default=True, type=click.IntRange(1), help="Of the image appended to.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes.")
def append(*, warm: Path, output: Path, gigabytes: int, rounds: int) -> None:
    """Add a warm state to a large image in a registry on this machine: seconds, memory, and what is sent."""
    from benchmarks.append import run, table

    check_place(output)
    report = run(warm, gigabytes=gigabytes, rounds=rounds, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@benchmarks.command("routes")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
def routes(*, output: Path, checkout: Path) -> None:
    """Bring one state into an image by every route that needs no GPU, prove each, and compare their warm layers."""
    from benchmarks.routes import run, table

    check_place(output)
    report = run(checkout, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@benchmarks.command("leak")
@weights_option
@warm_option
@device_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--requests", default=500, show_default=True, type=click.IntRange(10), help="One after the other.")
@tokens_option
@seeds_option
@voice_option
def leak(
    *, weights: Path, warm: Path, device: str, output: Path, requests: int, tokens: str, seeds: int, voice: str
) -> None:
    """Memory, handles, threads and hooks of a server over many requests; fails when one grows by more than 1 %."""
    from benchmarks.leak import LIMIT, run, table

    check_place(output)
    report = run(
        weights=weights,
        warm=warm,
        device=device,
        requests=requests,
        tokens=numbers(tokens),
        seeds=seeds,
        voice=voice,
        say=say,
    )
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
    if not report["flat"]:
        grown = ", ".join(name for name, entry in report["held"].items() if entry["growth"] > LIMIT)
        raise ModelError(f"the server grows: {grown}", next_step=f"see the samples in {output}")


@benchmarks.command("pods")
@click.option("--manifests", type=click.File(encoding="utf-8"), default="-", help="A file; by default standard input.")
@click.option("--image", help="In the place of the manifests'; podman has it.")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Starts of each.")
@tokens_option
@click.option("--clients", default=4, show_default=True, type=click.IntRange(1), help="That ask during the update.")
def pods(*, manifests: TextIO, image: str | None, output: Path, rounds: int, tokens: str, clients: int) -> None:
    """Start a pod of manifests on podman, warm and cold in turn, under the kubelet's rules; update one under load."""
    import yaml

    from benchmarks.pods import run, table

    check_place(output)
    try:
        documents = [document for document in yaml.safe_load_all(manifests) if isinstance(document, dict)]
    except yaml.YAMLError as error:
        raise BadInputError(f"the manifests are no YAML: {error}", next_step="see `kubectl kustomize`") from error
    report = run(documents, image=image, rounds=rounds, tokens=numbers(tokens), clients=clients, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
    found = report["update"]
    if found["sound"] < found["answers"] or found["killed"] or found["old_exit_code"] or found["misses"]:
        raise ModelError("the update was not clean", next_step=f"see {output}")


if __name__ == "__main__":
    with exit_with_code():
        benchmarks(standalone_mode=False)
