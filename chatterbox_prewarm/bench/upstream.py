"""Upstream as it is, in one fresh process: import, `from_local`, `prepare_conditionals` of a clip, `generate`.

Nothing of this project's loading is used. The one change is a bound on the sampled tokens, the same for every system:
random weights never sample the stop token.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import WarmupMetrics
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

#: How many requests after the first one are measured; the steady request is their median.
STEADY_REQUESTS = 3


def load(weights: str, device: str) -> ChatterboxTTS:
    """Upstream's own loading; a shortened checkpoint, for rehearsals, needs its constructors shortened too."""
    from chatterbox.tts import ChatterboxTTS

    synthetic = read_record(Path(weights)).synthetic
    if synthetic is None or synthetic.t3_layers is None:
        return ChatterboxTTS.from_local(weights, device)
    from chatterbox_prewarm.model.synthetic import shortened_upstream

    with shortened_upstream(synthetic):
        return ChatterboxTTS.from_local(weights, device)


def run(*, weights: str, clip: str, text: str, max_new_tokens: int, device: str) -> dict[str, Any]:
    """Start upstream, speak once, and then as often as a steady request is measured.

    Returns:
        the log, with the marks imported, loaded, attached and first_audio, the seconds of the later requests
        (`steady`), and the bytes read.
    """
    metrics = WarmupMetrics()
    importlib.import_module("chatterbox.tts")
    metrics.mark("imported")
    model = load(weights, device)
    metrics.mark("loaded")
    model.prepare_conditionals(clip)
    metrics.mark("attached")
    inference = model.t3.inference

    def bounded(**arguments: Any) -> Any:
        return inference(**{**arguments, "max_new_tokens": max_new_tokens})

    model.t3.inference = bounded
    model.generate(text)
    metrics.mark("first_audio")
    steady = []
    for _ in range(STEADY_REQUESTS):
        started = time.monotonic()
        model.generate(text)
        steady.append(time.monotonic() - started)
    return {**metrics.to_dict(), "steady": steady, "read_bytes": read_bytes("self")}


def read_bytes(pid: int | str) -> int:
    """Bytes that a process has caused to be read from storage, from `/proc/PID/io`."""
    return parse_read_bytes(Path(f"/proc/{pid}/io").read_text(encoding="ascii"))


def parse_read_bytes(text: str) -> int:
    """The field `read_bytes` of a `/proc/PID/io`."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    raise AssertionError("the kernel names read_bytes in /proc/PID/io")


if __name__ == "__main__":
    report(run)
