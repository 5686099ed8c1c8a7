"""Run upstream without changes in one fresh process: import, `from_local`, `prepare_conditionals`, `generate`.

The loading code of this project is not used. The only addition is a limit on the sampled tokens, the same for every
system, because random weights never sample the stop token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.metrics import StartMetrics
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import get_variant

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

#: Default number of requests after the first one. The steady request is their median.
STEADY_REQUESTS = 3


def load(weights: str, device: str) -> ChatterboxTTS:
    """Load a checkpoint with upstream's code; patch its constructors if the checkpoint has fewer layers."""
    record = read_record(Path(weights))
    variant = get_variant(record.variant)
    code = code_of(variant)
    if record.synthetic is None or record.synthetic.t3_layers is None:
        return code.upstream_from_local(Path(weights), variant, device)
    from chatterbox_prewarm.model.synthetic import shortened_upstream

    with shortened_upstream(variant, record.synthetic):
        return code.upstream_from_local(Path(weights), variant, device)


def run(*, weights: str, clip: str, text: str, max_new_tokens: int, device: str, requests: int) -> dict[str, Any]:
    """Start upstream, send a first request, then the requests that give the steady figure.

    Returns:
        the metrics with the marks imported, loaded, attached and first_audio, the seconds of each later request
        (`steady`), and the bytes read from storage.
    """
    metrics = StartMetrics()
    variant = get_variant(read_record(Path(weights)).variant)
    code = code_of(variant)
    language = variant.check_language(None)
    code.upstream_class()
    metrics.mark("imported")
    model = load(weights, device)
    metrics.mark("loaded")
    model.prepare_conditionals(clip)
    metrics.mark("attached")
    limit_tokens(model, max_new_tokens)
    code.upstream_generate(model, text, language)
    metrics.mark("first_audio")
    steady = []
    for _ in range(requests):
        started = time.monotonic()
        code.upstream_generate(model, text, language)
        steady.append(time.monotonic() - started)
    return {**metrics.to_dict(), "steady": steady, "read_bytes": read_bytes("self")}


def limit_tokens(model: ChatterboxTTS, max_new_tokens: int) -> None:
    """Limit the speech tokens of `model.generate`, because random weights never stop."""
    from chatterbox_prewarm.model.upstream import variant_of

    code_of(variant_of(model)).limit_upstream(model, max_new_tokens)


def read_bytes(pid: int | str) -> int:
    """Return the bytes that a process has read from storage, from `/proc/PID/io`."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines())
    return int(fields["read_bytes"])


if __name__ == "__main__":
    report(run)
