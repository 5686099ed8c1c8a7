"""The whole way of the data on this machine, with random weights: what `make demo` runs.

Everything is real but the weights: synthesize, bake, pack, prove, then upstream, ours cold and ours warm side by side.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bench.startup import benchmark_warmup_effectiveness, table
from chatterbox_prewarm.errors import ModelError, exit_with_code
from chatterbox_prewarm.image.layer import pack
from chatterbox_prewarm.proof.checks import require_passed
from chatterbox_prewarm.proof.prove import prove
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import RECORD_NAME


def demo(work: Path, dist: Path) -> None:
    """Run the demonstration; `work` keeps the checkpoint and the state, `dist` gets the results."""
    weights, warm = work / "weights-full", work / "warm-full"
    dist.mkdir(parents=True, exist_ok=True)
    _say("1/5 a checkpoint of random weights: its speech will be noise, all else is as published")
    if (weights / RECORD_NAME).exists():
        click.echo(f"    {weights} is there from an earlier run")
    else:
        command = [sys.executable, "-m", "chatterbox_prewarm", "weights", "synthesize", str(weights)]
        made = run_process(command)
        if made.returncode != 0:
            raise ModelError("the checkpoint could not be made", next_step="see the message above")
        click.echo("    " + made.stdout.strip())
    _say("2/5 bake: warm up once, save what that made, start once from it")
    manifest = bake(weights, warm, cache=work / "cache", progress=lambda line: click.echo(f"    {line}"))
    for family in manifest.families:
        click.echo(f"    {family.name}: {family.size / 1e6:.1f} MB, saves {family.seconds_saved:.1f} s")
    _say("3/5 pack: the state as a deterministic image layer")
    layer = pack(warm, dist / "warm-layer.tar.gz")
    click.echo(f"    {layer.size / 1e6:.1f} MB, sha256:{layer.digest}")
    _say("4/5 prove: a fresh process, another user, no network, a read-only state")
    evidence = prove(warm, weights)
    written = dist / "evidence.json"
    written.write_text(evidence.to_json(), encoding="utf-8")
    for check in evidence.checks:
        click.echo(f"    {'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}")
    require_passed(evidence, written)
    _say("5/5 start: upstream as it is, ours cold, ours warm; each serves a sentence")
    report = benchmark_warmup_effectiveness(
        weights, warm, rounds=1, say=lambda line: click.echo(f"    {line}"), hello=dist / "hello.wav"
    )
    (dist / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    click.echo("\n" + table(report))
    click.echo(
        f"\nwrote {dist}/hello.wav (noise: the weights are random), report.json, evidence.json, warm-layer.tar.gz"
    )


_STARTED = time.monotonic()


def _say(line: str) -> None:
    click.echo(f"[{time.monotonic() - _STARTED:4.0f} s] {line}")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--dist", type=click.Path(path_type=Path), default=Path("dist"), show_default=True)
def main(*, work: Path, dist: Path) -> None:
    """Show the whole way of the data on this machine."""
    with exit_with_code():
        demo(work, dist)


if __name__ == "__main__":
    main()
