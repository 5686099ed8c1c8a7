"""`benchmarks conversion`: start upstream's `ChatterboxVC` and ours in fresh processes, and convert the same speech.

Upstream starts with an empty Numba cache, as in a fresh container.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chatterbox_prewarm.bench.starts import SCRATCH, settle, setup
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE
from chatterbox_prewarm.system.json_subprocess import run_module
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SYSTEMS = ("upstream", "ours")


def run(
    weights: Path, warm: Path, *, device: str, seconds: float, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure both systems in turn.

    Args:
        weights: the checkpoint.
        warm: a state that was baked for it.
        device: a torch device.
        seconds: the length of the speech.
        rounds: fresh processes of each system.
        say: called with one line for each process.

    Returns:
        the report: machine, versions, all runs, medians, ratios, and how the tokens and the audio compare.

    Raises:
        BadInputError: the checkpoint has fewer layers, and upstream's class cannot load it.
    """
    synthetic = read_record(weights).synthetic
    if synthetic is not None and synthetic.s3gen_blocks is not None:
        raise BadInputError("upstream's ChatterboxVC loads only full-size checkpoints", next_step="use --size full")
    runs: list[dict[str, Any]] = []
    audio: dict[str, NDArray[np.float32]] = {}
    tokens: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        for number in range(1, rounds + 1):
            for system in SYSTEMS:
                settle(weights, warm)
                say(f"{system}, {number} of {rounds}")
                folder = Path(scratch) / f"{system}-{number}"
                folder.mkdir()
                arguments = {
                    "system": system,
                    "weights": str(weights),
                    "warm": str(warm),
                    "device": device,
                    "seconds": seconds,
                    "folder": str(folder),
                }
                environment = {**os.environ, "NUMBA_CACHE_DIR": f"{folder}/numba", "HF_HUB_OFFLINE": "1"}
                measured = run_module("benchmarks.conversion_process", arguments, env=environment)
                tokens[system] = measured.pop("tokens")
                audio[system] = np.load(folder / "audio.npy")
                runs.append({"system": system, **measured})
    medians = {
        system: {
            name: round(statistics.median(one[name] for one in runs if one["system"] == system), 3)
            for name in ("attached", "first_conversion", "steady_conversion", "resident_bytes")
        }
        for system in SYSTEMS
    }
    upstream, ours = (medians[system] for system in SYSTEMS)
    return {
        **setup(weights, warm, device),
        "seconds": seconds,
        "runs": runs,
        "medians": medians,
        "ratios": {name: round(ours[name] / upstream[name], 3) for name in upstream},
        "tokens": len(tokens["ours"]),
        "tokens_equal": tokens["ours"] == tokens["upstream"],
        "audio_seconds": len(audio["ours"]) / CLIP_SAMPLE_RATE,
        "decibels": _decibels(audio["ours"], audio["upstream"]),
    }


def table(report: dict[str, Any]) -> str:
    """Format the medians and the comparison."""
    lines = [f"{'':24}" + "".join(f"{system:>12}" for system in (*SYSTEMS, "ratio"))]
    for name, ratio in report["ratios"].items():
        unit = 1e6 if name == "resident_bytes" else 1.0
        cells = [report["medians"][system][name] / unit for system in SYSTEMS]
        title = "peak memory, MB" if name == "resident_bytes" else f"{name.replace('_', ' ')}, s"
        lines.append(f"{title:24}" + "".join(f"{cell:12.2f}" for cell in (*cells, ratio)))
    equal = "equal" if report["tokens_equal"] else "different"
    lines.append(f"{report['seconds']} s of speech became {report['audio_seconds']:.2f} s; the tokens are {equal}; ")
    lines[-1] += f"the difference of the audio is {report['decibels']:.0f} dB below it"
    return "\n".join(lines)


def _decibels(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    if ours.shape != theirs.shape:
        return 0.0
    difference = np.square(ours - theirs, dtype=np.float64).sum()
    return round(float(10 * np.log10(np.square(theirs, dtype=np.float64).sum() / max(difference, 1e-30))), 1)
