"""The command `bench`."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    Form,
    check_output,
    device_option,
    usage_error,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.commands.progress import end, say
from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def bench() -> None:
    """Measure starts, load and the claims. Compare only figures of one run."""


output_option = click.option("--output", type=PATH, required=True, help="JSON file for the report.")


def _check_systems(text: str) -> None:
    from chatterbox_prewarm.bench.startup import check_systems

    check_systems(text.split(","))


@bench.command("startup")
@weights_option
@warm_option
@device_option
@output_option
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each system.")
@click.option("--cold-pages", is_flag=True, help="Add a round with the page cache dropped (needs root).")
@click.option(
    "--systems",
    default="torch,upstream,cold,warm",
    show_default=True,
    type=Form("systems", _check_systems),
    help="Systems to measure.",
)
def bench_startup(*, output: Path, systems: str, **fields: Any) -> None:
    """Time starts of upstream and of our server.

    Fresh processes of bare torch, of upstream without changes, of our cold and of our warm server alternate. An
    interrupted run leaves the starts that it measured in the report, with `complete` false.
    """
    from chatterbox_prewarm.bench.startup import measure_starts, table

    check_output(output)
    report = measure_starts(
        systems=systems.split(","), say=say, save=lambda found: write_report(found, output), **fields
    )
    end()
    click.echo(table(report))


@bench.command("report")
@weights_option
@warm_option
@device_option
@click.option("--output", type=PATH, required=True, help="Folder for the page, its charts and results.json.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each system.")
@click.option(
    "--parts",
    help="Parts to measure: state, starts, requests, calls, memory, levels, ablation, profiles, growth, load, quality. "
    "Default: all.",
)
@click.option("--profiles", default=",".join(PROFILES), show_default=True, help="Profiles to bake and compare.")
@click.option("--clients", default="1,4,16", show_default=True, help="Numbers of concurrent clients.")
@click.option("--requests", default=3, show_default=True, type=click.IntRange(1), help="Requests of each client.")
def bench_report(*, output: Path, parts: str | None, profiles: str, clients: str, **fields: Any) -> None:
    """Measure this project's claims, and write a page.

    The same command continues an interrupted run.
    """
    from chatterbox_prewarm.bench.report.page import generate_warmup_report
    from chatterbox_prewarm.bench.report.run import run_warmup_benchmarks

    options = {"profiles": profiles.split(","), "clients": numbers(clients), **fields}
    if parts is not None:
        options["parts"] = parts.split(",")
    importlib.import_module("chatterbox_prewarm.bench.report.charts")  # report a missing package before the measurement
    results = run_warmup_benchmarks(output, say=say, **options)
    click.echo(f"wrote {generate_warmup_report(results, output)}")
    if results["failed"]:
        raise ModelError(
            f"{len(results['failed'])} step(s) failed: {'; '.join(results['failed'])}",
            next_step="run the same command again to repeat them",
        )


@bench.command("compare")
@click.argument("old", type=PATH)
@click.argument("new", type=PATH)
@click.option("--force", is_flag=True, help="Compare also results of different machines, versions or checkpoints.")
def bench_compare(*, old: Path, new: Path, force: bool) -> None:
    """Compare two reports (results.json).

    A regression beyond the noise of their A/A runs is an error.
    """
    from chatterbox_prewarm.bench.report.compare import compare

    comparison = compare(old, new, force=force)
    click.echo(comparison.table())
    if comparison.regressions:
        raise ModelError(
            f"worse than before: {'; '.join(comparison.regressions)}",
            next_step=f"measure again to confirm it, or accept it by copying {new} to {old}",
        )


tokens_option = click.option(
    "--tokens",
    default="25,75,200",
    show_default=True,
    help="Limits of speech tokens for a short, a medium and a long text (25 per second of audio).",
)
seeds_option = click.option("--seeds", default=4, show_default=True, type=click.IntRange(1), help="Number of seeds.")
voice_option = click.option("--voice", default="default", show_default=True, help="Voice of all requests.")


@bench.command("load")
@click.option("--url", help="Address of a running server, such as http://localhost:8000. Default: start a server.")
@weights_option
@warm_option
@device_option
@output_option
@click.option("--clients", default="1,4,16", show_default=True, help="Concurrent clients, one number after the other.")
@click.option("--requests", default=20, show_default=True, type=click.IntRange(1), help="Requests of each client.")
@tokens_option
@seeds_option
@voice_option
@click.option(
    "--look-ahead",
    type=click.IntRange(3),
    help="Tokens that a stream looks ahead. Default: it waits for the last token.",
)
def bench_load(*, output: Path, clients: str, tokens: str, **fields: Any) -> None:
    """Measure a server under load, and check every audio.

    The report has latency, time to the first chunk and throughput for each number of concurrent clients. An
    interrupted run leaves the numbers of clients that it measured in the report, with `complete` false.
    """
    from chatterbox_prewarm.bench.load import LoadOptions, faults, run, table

    check_output(output)
    options = LoadOptions(clients=numbers(clients), tokens=numbers(tokens), **fields)
    report = run(options, say=say, save=lambda found: write_report(found, output))
    end()
    click.echo(table(report))
    if messages := faults(report):
        raise ModelError("; ".join(messages), next_step=f"see {output}, and the log of the server")


def write_report(report: dict[str, Any], output: Path) -> None:
    """Write a report as JSON."""
    write_whole(output, json.dumps(report, indent=1, sort_keys=True) + "\n")


def numbers(text: str) -> list[int]:
    """Parse positive integers that are separated by commas.

    Raises:
        click.UsageError: the text is not such a list.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise usage_error(f"{text!r} is not a list of positive numbers", "write them as 1,4,16")
    return [int(part) for part in parts]
