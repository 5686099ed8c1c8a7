"""`benchmarks launches`: count what a step of T3 launches on a GPU, with packages and in eager mode, without a GPU.

A state that was compiled for the GPU is started on a stand-in, which records each kernel and each matrix product. The
benchmark also says how long the GPU needs at least to read the weights of the step.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from chatterbox_prewarm.bench.starts import SCRATCH, checkpoint
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.start.attach import attach_baked, with_eager_regions
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.fingerprint import ABSENT
from chatterbox_prewarm.system.gpu_stand_in import READS_ZEROS, make_stand_in
from chatterbox_prewarm.system.gpu_targets import find_target
from chatterbox_prewarm.system.json_subprocess import report, run_module

_LOG = "CHATTERBOX_PREWARM_STAND_IN_LOG"
#: Positions of the KV cache.
_POSITIONS = 64
#: Bytes per second that a GPU reads from its memory, from NVIDIA's data sheets.
_BANDWIDTH = {
    "Tesla T4": 320e9,
    "NVIDIA A10": 600e9,
    "NVIDIA A100-SXM4-80GB": 2039e9,
    "NVIDIA L4": 300e9,
    "NVIDIA L40S": 864e9,
    "NVIDIA H100 80GB HBM3": 3350e9,
    "NVIDIA H200": 4800e9,
    "NVIDIA B200": 8000e9,
}
#: The kinds of lines in the log: kernels of the packages, kernels of torch, and matrix products.
KINDS = {"launch": "kernels of the packages", "torch": "kernels of torch", "gemm": "matrix products"}


def count(weights: Path, warm: Path) -> dict[str, Any]:
    """Count the launches of a step.

    Args:
        weights: checkpoint.
        warm: a state that was compiled for a GPU without it.

    Returns:
        the state, the lines of the log for each mode, the bytes of the weights that a step reads, and the seconds that
        the GPU needs for that, or None if its bandwidth is unknown.

    Raises:
        BadInputError: the state was not compiled without its GPU.
    """
    manifest = State.read(warm).manifest
    if not manifest.cross_compiled:
        raise BadInputError(
            f"{warm} was not compiled for a GPU that the machine lacks",
            next_step="bake with --device cuda --target GPU",
        )
    if manifest.execution.graphs:
        raise BadInputError(
            f"{warm} runs a step in eager mode, in a CUDA graph", next_step="bake with the option --no-graphs"
        )
    gpu = manifest.fingerprint["gpu"]
    capability = manifest.fingerprint["compute_capability"].replace(".", "")
    target = find_target(f"sm_{capability}" if gpu == ABSENT else gpu)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        folder = Path(scratch) / "stand-in"
        folder.mkdir()
        environment = {**os.environ, **make_stand_in(target, folder), **READS_ZEROS, _LOG: f"{scratch}/log"}
        paths = {"weights": str(weights.resolve()), "warm": str(warm.resolve()), "cache": f"{scratch}/cache"}
        found = run_module("benchmarks.launches", paths, env=environment)
    bandwidth = _BANDWIDTH.get(target.gpu)
    return {
        "state": {"key": manifest.set_digest, "target": target.name, "torch": manifest.fingerprint["torch"]},
        "weights": checkpoint(weights),
        **found,
        "seconds_to_read_weights": None if bandwidth is None else found["weight_bytes"] / bandwidth,
    }


def run(*, weights: str, warm: str, cache: str) -> dict[str, Any]:
    """Run in the process with the stand-in."""
    options = StartOptions(warm=Path(warm), weights=Path(weights), cache=Path(cache), device="cuda", policy="require")
    attached = attach_baked(prepare(options))
    import torch

    log = Path(os.environ[_LOG])

    def step(decoder: Any) -> list[str]:
        state = decoder._acquire_state(_POSITIONS, nucleus=False)
        decoder._step(state, decoder._samplers[False], state.positions)  # the first call allocates buffers
        before = log.stat().st_size
        decoder._step(state, decoder._samplers[False], state.positions)
        return log.read_bytes()[before:].decode(errors="replace").splitlines()

    with torch.inference_mode():
        packages = step(attached.synthesizer.model.decoder)
        eager = step(with_eager_regions(attached).synthesizer.model.decoder)
    tensors = attached.synthesizer.model.tensors
    read = ("t3.tfmr.layers.", "t3.tfmr.norm.", "t3.speech_head.")
    return {
        "packages": packages,
        "eager": eager,
        "weight_bytes": sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(read)),
        "metrics": attached.metrics.to_dict(),
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Replace the lines of the log by the number of each kind."""
    counted = {mode: Counter(line.split()[0] for line in found[mode]) for mode in ("packages", "eager")}
    rest = {name: value for name, value in found.items() if name not in {*counted, "metrics"}}
    return {**rest, **{mode: {kind: numbers[kind] for kind in KINDS} for mode, numbers in counted.items()}}


def table(counted: dict[str, Any]) -> str:
    """Format what `summary` returned."""
    lines = [f"  {'':<24}{'packages':>10}{'eager':>10}"]
    lines += [
        f"  {title:<24}{counted['packages'][kind]:>10}{counted['eager'][kind]:>10}" for kind, title in KINDS.items()
    ]
    lines.append(f"  weights read: {counted['weight_bytes'] / 1e9:.2f} GB")
    if counted["seconds_to_read_weights"] is not None:
        lines.append(f"  at least {1000 * counted['seconds_to_read_weights']:.2f} ms on {counted['state']['target']}")
    return "\n".join(lines)


if __name__ == "__main__":
    report(run)
