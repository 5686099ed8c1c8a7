"""bench: what is measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    check_place,
    device_option,
    say,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from pathlib import Path


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
) -> None:
    """Concurrent clients: latency, time to the first chunk, throughput; none lost, and every sound the right one."""
    from chatterbox_prewarm.bench.load import faults, run, table

    check_place(output)
    report = run(
        url=url,
        weights=weights,
        warm=warm,
        device=device,
        clients=numbers(clients),
        requests=requests,
        tokens=numbers(tokens),
        seeds=seeds,
        voice=voice,
        look_ahead=look_ahead,
        say=say,
    )
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))
    if found := faults(report):
        raise ModelError("; ".join(found), next_step=f"see {output}, and the server's log")


def numbers(text: str) -> list[int]:
    """Whole numbers above zero, with commas between them.

    Raises:
        BadInputError: they are not.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise BadInputError(f"{text!r} is no list of numbers", next_step="write them as 1,4,16")
    return [int(part) for part in parts]
