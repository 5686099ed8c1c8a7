"""Run the complete data flow on this machine with random weights, for `make demo`.

Only the weights are random. The steps are: synthesize a checkpoint, bake, pack, prove, and compare the starts of
upstream, our cold server and our warm server. Upstream is left out if the installed one cannot load the variant.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.bench.startup import SYSTEMS, measure_starts, table
from chatterbox_prewarm.errors import ModelError, exit_with_code
from chatterbox_prewarm.image.layer import pack
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.proof.checks import require_passed
from chatterbox_prewarm.proof.prove import ProofOptions, prove
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.compiler import missing_packages
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import RECORD_NAME
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, VARIANTS, Variant, get_variant

_STARTED = time.monotonic()
#: The system of `bench.startup.SYSTEMS` that needs upstream's own loader.
_UPSTREAM = "upstream"


def demo(work: Path, dist: Path, variant: str = DEFAULT_VARIANT.name) -> None:
    """Run the demo.

    Args:
        work: folder for the checkpoint, the cache and the warm state. A checkpoint from an earlier run is used again.
        dist: folder for the results.
        variant: the name of the model variant.
    """
    suffix = "full" if variant == DEFAULT_VARIANT.name else f"full-{variant}"
    weights, warm = work / f"weights-{suffix}", work / f"warm-{suffix}"
    dist.mkdir(parents=True, exist_ok=True)
    systems = _systems(get_variant(variant))
    _announce("1/5 checkpoint: as published, but with random weights, so the speech is noise")
    _create_checkpoint(weights, variant)
    _announce("2/5 bake: warm up, save the caches, start once from them")
    options = BakeOptions(weights=weights, warm=warm, cache=work / "cache", execution=_execution())
    for family in bake(options, progress=_detail).families:
        _detail(f"{family.name}: {family.size / 1e6:.1f} MB, saves {family.seconds_saved:.1f} s")
    _announce("3/5 pack: the warm state as a deterministic image layer")
    layer = pack(State.open(warm), dist / "warm-layer.tar.gz")
    _detail(f"{layer.size / 1e6:.1f} MB, sha256:{layer.digest}")
    _announce("4/5 prove: a fresh process with another user, no network and a read-only state")
    evidence = prove(ProofOptions(warm=warm, weights=weights))
    evidence_path = dist / "evidence.json"
    evidence_path.write_text(evidence.to_json(), encoding="utf-8")
    for check in evidence.checks:
        _detail(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}")
    require_passed(evidence, evidence_path)
    unchanged = "upstream unchanged, " if _UPSTREAM in systems else ""
    _announce(f"5/5 start: {unchanged}ours cold, ours warm; each answers a request")
    report = measure_starts(weights, warm, rounds=1, systems=systems, requests=1, say=_detail, hello=dist / "hello.wav")
    (dist / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    click.echo("\n" + table(report))
    click.echo(
        f"\nwrote {dist}/hello.wav (noise: the weights are random), report.json, evidence.json, warm-layer.tar.gz"
    )


def _systems(variant: Variant) -> tuple[str, ...]:
    """Return the systems to compare, without upstream if the installed one cannot load the variant."""
    if code_of(variant).upstream_loads(variant):
        return SYSTEMS
    _detail(f"the comparison leaves out upstream: the installed chatterbox-tts cannot load {variant.name}")
    _detail("to include it, install the main branch of resemble-ai/chatterbox")
    return tuple(system for system in SYSTEMS if system != _UPSTREAM)


def _create_checkpoint(weights: Path, variant: str) -> None:
    if (weights / RECORD_NAME).exists():
        _detail(f"{weights} exists from an earlier run")
        return
    command = [sys.executable, "-m", "chatterbox_prewarm", "weights", "synthesize", str(weights), "--variant", variant]
    finished = run_process(command)
    if finished.returncode != 0:
        raise ModelError("the checkpoint could not be created", next_step="see the message above")
    _detail(finished.stdout.strip())


def _execution() -> Execution | None:
    """Return `eager` if this machine cannot compile, or None for the default."""
    if not (missing := missing_packages()):
        return None
    _detail(f"without {' and '.join(missing)}, the regions of the model are not compiled (profile eager)")
    _detail(f"for a faster model, run: apt-get install {' '.join(missing)}")
    return Execution(profile="eager")


def _announce(step: str) -> None:
    click.echo(f"[{time.monotonic() - _STARTED:4.0f} s] {step}")


def _detail(line: str) -> None:
    click.echo(f"    {line}")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("out"), show_default=True)
@click.option("--dist", type=click.Path(path_type=Path), default=Path("dist"), show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default=DEFAULT_VARIANT.name, show_default=True)
def main(*, work: Path, dist: Path, variant: str) -> None:
    """Run the complete data flow on this machine."""
    with exit_with_code():
        demo(work, dist, variant)


if __name__ == "__main__":
    main()
