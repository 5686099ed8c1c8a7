"""bench: what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_place,
    device_option,
    say,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.profiles import PROFILES
from chatterbox_prewarm.staging import write_whole


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
    from chatterbox_prewarm.bench.startup import benchmark_warmup_effectiveness, table

    check_place(output)
    report = benchmark_warmup_effectiveness(
        weights, warm, rounds=rounds, cold_pages=cold_pages, systems=systems.split(","), device=device, say=say
    )
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
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
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
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
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
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
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


tokens_option = click.option(
    "--tokens",
    default="25,75,200",
    show_default=True,
    help="Most speech tokens of a short, a medium and a long text, 25 a second.",
)
seeds_option = click.option("--seeds", default=4, show_default=True, type=click.IntRange(1), help="Different ones.")
voice_option = click.option("--voice", default="default", show_default=True, help="Of all requests.")


@bench.command("load")
@click.option("--url", help="A server that runs, as http://localhost:8000; by default one is started.")
@weights_option
@warm_option
@device_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--clients", default="1,4,16", show_default=True, help="How many at a time, one level after the other.")
@click.option("--requests", default=20, show_default=True, type=click.IntRange(1), help="Of each client.")
@tokens_option
@seeds_option
@voice_option
@click.option("--look-ahead", type=click.IntRange(3), help="Tokens a stream looks ahead; by default it waits for all.")
@click.option("--kill-worker-after", type=click.FloatRange(0), metavar="S", help="Besides, kill a worker under load.")
def bench_load(
    *,
    url: str | None,
    weights: Path,
    warm: Path,
    device: str,
    output: Path,
    clients: str,
    requests: int,
    tokens: str,
    seeds: int,
    voice: str,
    look_ahead: int | None,
    kill_worker_after: float | None,
) -> None:
    """Concurrent clients: latency, time to the first chunk, throughput; none lost, and every sound the right one."""
    from chatterbox_prewarm.bench.load import faults, run, table

    check_place(output)
    report = run(
        url=url,
        weights=weights,
        warm=warm,
        device=device,
        clients=_numbers(clients),
        requests=requests,
        tokens=_numbers(tokens),
        seeds=seeds,
        voice=voice,
        look_ahead=look_ahead,
        kill_after=kill_worker_after,
        say=say,
    )
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
    if found := faults(report):
        raise ModelError("; ".join(found), next_step=f"see {output}, and the server's log")


@bench.command("leak")
@weights_option
@warm_option
@device_option
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--requests", default=500, show_default=True, type=click.IntRange(10), help="One after the other.")
@tokens_option
@seeds_option
@voice_option
def bench_leak(
    *, weights: Path, warm: Path, device: str, output: Path, requests: int, tokens: str, seeds: int, voice: str
) -> None:
    """Memory, handles, threads and hooks of a server over many requests; fails when one grows by more than 1 %."""
    from chatterbox_prewarm.bench.leak import LIMIT, run, table

    check_place(output)
    report = run(
        weights=weights,
        warm=warm,
        device=device,
        requests=requests,
        tokens=_numbers(tokens),
        seeds=seeds,
        voice=voice,
        say=say,
    )
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
    if not report["flat"]:
        grown = ", ".join(name for name, entry in report["held"].items() if entry["growth"] > LIMIT)
        raise ModelError(f"the server grows: {grown}", next_step=f"see the samples in {output}")


def _numbers(text: str) -> list[int]:
    """Whole numbers above zero, with commas between them.

    Raises:
        BadInputError: they are not.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInputError(f"{text!r} is no list of numbers", next_step="write them as 1,4,16")
    return [int(part) for part in parts]


@bench.command("routes")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
def bench_routes(*, output: Path, checkout: Path) -> None:
    """Bring one state into an image by every route that needs no GPU, prove each, and compare their warm layers."""
    from chatterbox_prewarm.bench.routes import run, table

    check_place(output)
    report = run(checkout, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@bench.command("pods")
@click.option("--manifests", type=click.File(encoding="utf-8"), default="-", help="A file; by default standard input.")
@click.option("--image", help="In the place of the manifests'; podman has it.")
@click.option("--output", type=PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Starts of each.")
@tokens_option
@click.option("--clients", default=4, show_default=True, type=click.IntRange(1), help="That ask during the update.")
def bench_pods(*, manifests: TextIO, image: str | None, output: Path, rounds: int, tokens: str, clients: int) -> None:
    """Start a pod of manifests on podman, warm and cold in turn, under the kubelet's rules; update one under load."""
    import yaml

    from chatterbox_prewarm.bench.pods import run, table

    check_place(output)
    try:
        documents = [document for document in yaml.safe_load_all(manifests) if isinstance(document, dict)]
    except yaml.YAMLError as error:
        raise BadInputError(f"the manifests are no YAML: {error}", next_step="see `kubectl kustomize`") from error
    report = run(documents, image=image, rounds=rounds, tokens=_numbers(tokens), clients=clients, say=say)
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
    found = report["update"]
    if found["sound"] < found["answers"] or found["killed"] or found["old_exit_code"] or found["misses"]:
        raise ModelError("the update was not clean", next_step=f"see {output}")
