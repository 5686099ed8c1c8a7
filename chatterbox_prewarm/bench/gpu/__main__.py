"""The command: every part that is not complete yet, one after the other, each bounded in time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from chatterbox_prewarm.bench.gpu.parts import PARTS
from chatterbox_prewarm.bench.gpu.record import Plan
from chatterbox_prewarm.errors import EngineError, exit_with_code
from chatterbox_prewarm.process import run as run_process


@click.command(help=__doc__)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("out/gpu"), show_default=True, help="For all of it."
)
@click.option("--device", default="cuda", show_default=True, help="The torch device; cpu is the rehearsal.")
@click.option("--size", type=click.Choice(["full", "mini"]), default="full", show_default=True, help="Of the weights.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Fresh processes of each system.")
@click.option("--seconds", type=click.FloatRange(1), default=480, show_default=True, help="The most that a part takes.")
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)), metavar="[PART]...")
def main(*, out: Path, device: str, size: str, rounds: int, seconds: float, parts: tuple[str, ...]) -> None:
    """Run the parts."""
    with exit_with_code():
        out.mkdir(parents=True, exist_ok=True)
        plan = Plan(out=str(out.resolve()), device=device, size=size, rounds=rounds)
        incomplete = [part for part in parts or PARTS if not _run(part, plan, seconds)]
    if incomplete:
        click.echo(f"not complete: {', '.join(incomplete)}; the same command goes on with them", err=True)
        sys.exit(EngineError.exit_code)


def _run(part: str, plan: Plan, seconds: float) -> bool:
    """One part; whether it is complete."""
    result = Path(plan.out) / f"{part}.json"
    if _is_complete(result):
        click.echo(f"{part}: complete, in {result}")
        return True
    arguments = json.dumps({"part": part, **asdict(plan)})
    try:
        run_process([sys.executable, "-m", "chatterbox_prewarm.bench.gpu.parts", arguments], timeout=seconds)
    except EngineError as error:
        click.echo(f"{part}: {error.message}", err=True)
    click.echo(f"{part}: {'complete' if _is_complete(result) else 'not complete'}, in {result}")
    return _is_complete(result)


def _is_complete(result: Path) -> bool:
    return result.exists() and bool(json.loads(result.read_text(encoding="utf-8"))["complete"])


if __name__ == "__main__":
    main()
