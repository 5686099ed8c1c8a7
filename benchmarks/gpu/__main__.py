"""Run every part that is not complete yet, one after the other, each with a time limit."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.plan import Plan
from chatterbox_prewarm.bench.recorded_steps import is_complete
from chatterbox_prewarm.errors import EngineError, PrewarmError, exit_with_code
from chatterbox_prewarm.system.json_subprocess import run_module


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for all files. Default: out/DEVICE-SIZE.")
@click.option("--device", default="cuda", show_default=True, help="Torch device; cpu is a rehearsal.")
@click.option(
    "--size", type=click.Choice(["full", "mini"]), default="full", show_default=True, help="Size of the weights."
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Fresh processes of each system.")
@click.option("--seconds", type=click.FloatRange(1), default=480, show_default=True, help="Time limit of each part.")
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)), metavar="[PART]...")
def main(*, out: Path | None, device: str, size: str, rounds: int, seconds: float, parts: tuple[str, ...]) -> None:
    """Run the incomplete parts."""
    with exit_with_code():
        out = out or Path("out") / f"{device.replace(':', '-')}-{size}"
        out.mkdir(parents=True, exist_ok=True)
        plan = Plan(out=str(out.resolve()), device=device, size=size, rounds=rounds)
        incomplete = [part for part in parts or PARTS if not _run(part, plan, seconds)]
    if incomplete:
        click.echo(f"not complete: {', '.join(incomplete)}; run the same command again to continue", err=True)
        sys.exit(EngineError.exit_code)


def _run(part: str, plan: Plan, seconds: float) -> bool:
    """Run one part; return whether it is complete."""
    result = Path(plan.out) / f"{part}.json"
    if is_complete(result, asdict(plan)):
        click.echo(f"{part}: complete, in {result}")
        return True
    try:
        run_module("benchmarks.gpu.parts", {"part": part, **asdict(plan)}, timeout=seconds)
    except PrewarmError as error:
        click.echo(f"{part}: {error.message}", err=True)
    complete = is_complete(result, asdict(plan))
    click.echo(f"{part}: {'complete' if complete else 'not complete'}, in {result}")
    return complete


if __name__ == "__main__":
    main()
