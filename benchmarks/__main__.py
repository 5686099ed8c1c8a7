"""The developers' benchmarks: `python -m benchmarks COMMAND`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import click

from benchmarks.routes import ROUTES
from chatterbox_prewarm.bench.t3_calls import MIN_CALLS
from chatterbox_prewarm.commands.bench import (
    numbers,
    output_option,
    seeds_option,
    tokens_option,
    voice_option,
    write_report,
)
from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_output,
    device_option,
    note,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError, ModelError, exit_with_code
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.system.progress import show_details

checkout_option = click.option(
    "--checkout", type=PATH, default=Path(), help="Checkout of this project. Default: the current directory."
)


@click.group()
def benchmarks() -> None:
    """Measure this project while you change it. Compare only figures of one run."""


@benchmarks.command("profiles")
@weights_option
@cache_option
@device_option
@output_option
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each profile.")
@click.option("--profiles", default=",".join(PROFILES), show_default=True, help="Profiles to measure.")
def profiles(*, weights: Path, cache: Path, device: str, output: Path, rounds: int, profiles: str) -> None:
    """Bake each profile, then time fresh processes of upstream and of each profile in turn."""
    from benchmarks.profiles import run, table

    check_output(output)
    report = run(weights, cache=cache, device=device, profiles=profiles.split(","), rounds=rounds, say=note)
    write_report(report, output)
    click.echo(table(report))


@benchmarks.command("image")
@output_option
@click.option(
    "--size", default="full", show_default=True, type=click.Choice(["full", "mini"]), help="Size of the weights."
)
@checkout_option
def image(*, output: Path, size: str, checkout: Path) -> None:
    """Build and prove an image with random weights, and again after a change of one Python file."""
    from benchmarks.image import run

    check_output(output)
    report = run(checkout, size=size, say=note)
    write_report(report, output)
    rebuild = report["after a change"]
    seconds, steps = rebuild["build_seconds"], rebuild["steps"]
    click.echo(f"after a change of {report['changed']}: {seconds} s, {len(steps)} steps ran:")
    for step in steps:
        click.echo(f"  {step}")


@benchmarks.command("containers")
@click.option("--image", required=True, help="Image in Docker's store.")
@output_option
@click.option("--counts", default="1,2,4,8", show_default=True, help="Numbers of containers that start at once.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Starts of a single container.")
def containers(*, image: str, output: Path, counts: str, rounds: int) -> None:
    """Pull an image into an empty containerd, and start containers from it, one or several at once."""
    from benchmarks.containers import run, table

    check_output(output)
    report = run(image, counts=numbers(counts), rounds=rounds, say=note)
    write_report(report, output)
    click.echo(table(report))


@benchmarks.command("snapshot")
@weights_option
@warm_option
@output_option
@click.option("--criu", default="criu", show_default=True, help="The program CRIU.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Starts and restores.")
def snapshot(*, weights: Path, warm: Path, output: Path, criu: str, rounds: int) -> None:
    """Freeze a ready process with CRIU, and compare its restore with a warm start."""
    from benchmarks.snapshot import run, table

    check_output(output)
    report = run(weights, warm, criu=criu, rounds=rounds, say=note)
    write_report(report, output)
    click.echo(table(report))


@benchmarks.command("launches")
@weights_option
@warm_option
@output_option
def launches(*, weights: Path, warm: Path, output: Path) -> None:
    """Count the kernels of a step of T3 on a GPU, without a GPU, from a state that was baked with --target."""
    from benchmarks.launches import count, summary, table

    check_output(output)
    counted = summary(count(weights, warm))
    write_report(counted, output)
    click.echo(table(counted))


@benchmarks.command("append")
@warm_option
@output_option
@click.option("--gigabytes", default=9, show_default=True, type=click.IntRange(1), help="Size of the base image.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Number of fresh processes.")
def append(*, warm: Path, output: Path, gigabytes: int, rounds: int) -> None:
    """Append a warm state to a large image in a local registry; measure seconds, memory and bytes sent."""
    from benchmarks.append import run, table

    check_output(output)
    report = run(warm, gigabytes=gigabytes, rounds=rounds, say=note)
    write_report(report, output)
    click.echo(table(report))


@benchmarks.command("routes")
@output_option
@checkout_option
@click.option("--route", "names", multiple=True, type=click.Choice(ROUTES), help="A route; repeatable. Default: all.")
def routes(*, output: Path, checkout: Path, names: tuple[str, ...]) -> None:
    """Add one state to an image by every route that needs no GPU, prove each image, and compare the warm layers.

    The classic builder bakes the state, so this route is always run.
    """
    from benchmarks.routes import run, table

    check_output(output)
    report = run(checkout, names=names or ROUTES, say=note)
    write_report(report, output)
    click.echo(table(report))


@benchmarks.command("calls")
@weights_option
@warm_option
@cache_option
@device_option
@output_option
@click.option("--calls", default=200, show_default=True, type=click.IntRange(MIN_CALLS), help="Calls of each system.")
def calls(*, weights: Path, warm: Path, cache: Path, device: str, output: Path, calls: int) -> None:
    """Time many calls of T3 in one process, upstream's and ours in turn.

    A warm state of other weights can be used, too: its compiled regions fit.
    """
    from chatterbox_prewarm.bench.starts import setup
    from chatterbox_prewarm.bench.t3_calls import TOKENS, run, saved_milliseconds

    check_output(output)
    conditions = {**setup(weights, warm, device), "tokens": TOKENS, "calls": calls}  # first, for its errors
    show_details(lambda text, *_: note(text))
    paths = {"weights": str(weights), "warm": str(warm), "cache": str(cache)}
    result = run(**paths, device=device, calls=calls, policy="fallback")
    write_report({**conditions, **result}, output)
    for name, seconds in result["last"].items():
        ratio = seconds / result["first"][name]
        click.echo(f"{name}: the last five calls took {ratio:.2f} times as long as calls 2 to 6")
    saved = saved_milliseconds(result["seconds"])
    click.echo(f"ours has the first {TOKENS} speech tokens {saved:.0f} ms earlier (median of all pairs)")
    click.echo("hooks of upstream's T3: {} before, {} after".format(*result["hooks"]))


@benchmarks.command("conversion")
@weights_option
@warm_option
@device_option
@output_option
@click.option(
    "--seconds", default=10.0, show_default=True, type=click.FloatRange(0.2, 40), help="Length of the speech."
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each system.")
def conversion(*, weights: Path, warm: Path, device: str, output: Path, seconds: float, rounds: int) -> None:
    """Start upstream's ChatterboxVC and ours in fresh processes, and convert the same speech."""
    from benchmarks.conversion import run, table

    check_output(output)
    report = run(weights, warm, device=device, seconds=seconds, rounds=rounds, say=note)
    write_report(report, output)
    click.echo(table(report))


@benchmarks.command("leak")
@weights_option
@warm_option
@device_option
@output_option
@click.option("--requests", default=500, show_default=True, type=click.IntRange(10), help="Number of requests.")
@tokens_option
@seeds_option
@voice_option
def leak(*, output: Path, tokens: str, **fields: Any) -> None:
    """Sample memory, handles and threads of a server during many requests; fail if one grows by over 1 %."""
    from benchmarks.leak import LIMIT, run, table
    from chatterbox_prewarm.bench.load import LoadOptions

    check_output(output)
    report = run(LoadOptions(tokens=numbers(tokens), **fields), say=note)
    write_report(report, output)
    click.echo(table(report))
    if not report["flat"]:
        grown = ", ".join(name for name, entry in report["held"].items() if entry["growth"] > LIMIT)
        raise ModelError(f"the server grows: {grown}", next_step=f"see the samples in {output}")


@benchmarks.command("kill")
@weights_option
@warm_option
@device_option
@output_option
@click.option("--after", default=10.0, show_default=True, type=click.FloatRange(0), help="Seconds of load before.")
@click.option("--clients", default=16, show_default=True, type=click.IntRange(1), help="Number of concurrent clients.")
@click.option("--requests", default=20, show_default=True, type=click.IntRange(1), help="Requests of each client.")
@tokens_option
@seeds_option
@voice_option
def kill(*, output: Path, after: float, clients: int, tokens: str, **fields: Any) -> None:
    """Kill a worker under load: each request gets its audio or a clean refusal, and the server becomes ready again."""
    from benchmarks.kill import faults, run, table
    from chatterbox_prewarm.bench.load import LoadOptions

    check_output(output)
    report = run(LoadOptions(clients=(clients,), tokens=numbers(tokens), **fields), after=after, say=note)
    write_report(report, output)
    click.echo(table(report))
    if messages := faults(report):
        raise ModelError("; ".join(messages), next_step=f"see {output}, and the log of the server")


@benchmarks.command("pods")
@click.option("--manifests", type=click.File(encoding="utf-8"), default="-", help="YAML file. Default: standard input.")
@click.option("--image", help="Image to run instead of the one in the manifests. Podman must have it.")
@output_option
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Starts of each kind.")
@tokens_option
@click.option("--clients", default=4, show_default=True, type=click.IntRange(1), help="Clients during the update.")
def pods(*, manifests: TextIO, image: str | None, output: Path, rounds: int, tokens: str, clients: int) -> None:
    """Start a pod with podman, warm and cold, under the kubelet's rules for probes; then update it under load."""
    import yaml

    from benchmarks.pods import run, table

    check_output(output)
    try:
        documents = [document for document in yaml.safe_load_all(manifests) if isinstance(document, dict)]
    except yaml.YAMLError as error:
        raise BadInputError(f"the manifests are not YAML: {error}", next_step="see `kubectl kustomize`") from error
    report = run(documents, image=image, rounds=rounds, tokens=numbers(tokens), clients=clients, say=note)
    write_report(report, output)
    click.echo(table(report))
    update = report["update"]
    if update["sound"] < update["answers"] or update["killed"] or update["old_exit_code"] or update["misses"]:
        raise ModelError("the update was not clean", next_step=f"see {output}")


if __name__ == "__main__":
    with exit_with_code():
        benchmarks()
