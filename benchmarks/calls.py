"""`benchmarks calls`: does a call of T3 take longer the more calls came before it, and how soon are its tokens there?

Each call of upstream's Multilingual T3 adds hooks to the layers that its alignment analyzer watches, and they stay. A
stream sends its first chunk after the first speech tokens, so the difference of two calls is time to the first chunk.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.starts import checkpoint, machine, versions
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.start.attach import load_warmup_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TEXT = "The quick brown fox jumps over the lazy dog."
_TOKENS = 8
#: The number of calls at the beginning, without the first one, and at the end whose medians are compared.
_COMPARED = 5


def run(
    weights: Path, *, warm: Path, cache: Path, device: str, calls: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Call our T3 and upstream's in turn.

    Args:
        weights: the checkpoint.
        warm: a warm state; without one, the regions run in eager mode.
        cache: a writable directory.
        device: a torch device.
        calls: the number of calls of each.
        say: called with one line for each 50 calls.

    Returns:
        the report: machine, versions, and for each system the seconds of all calls and the ratio of the last five to
        the calls 2 to 6. For both groups of calls, the milliseconds by which ours is faster. The number of hooks.
    """
    import torch

    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.upstream import upstream_text_tokens
    from chatterbox_prewarm.model.voices import for_upstream
    from chatterbox_prewarm.start.upstream import attach_upstream

    attached = load_warmup_cache(warm, weights, cache=cache, device=device)
    synthesizer = attached.synthesizer
    upstream = attach_upstream(attached.prepared, lean=synthesizer.model)
    conditionals, text = for_upstream(synthesizer.voices[DEFAULT_VOICE]), upstream_text_tokens(upstream, _TEXT)
    hooks = _hooks(upstream.t3)

    @torch.inference_mode()
    def call_upstream() -> None:
        upstream.t3.inference(t3_cond=conditionals.t3, text_tokens=text, max_new_tokens=_TOKENS)

    def call_ours() -> None:
        for _ in synthesizer.token_blocks(_TEXT, max_new_tokens=_TOKENS):
            pass

    systems = {"ours": call_ours, "upstream": call_upstream}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(1, calls + 1):
        for name, call in systems.items():
            seed_everything(0)
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
        if number % 50 == 0:
            say(f"{number} of {calls} calls")
    medians = {
        name: {
            "first": statistics.median(values[1 : 1 + _COMPARED]),
            "last": statistics.median(values[-_COMPARED:]),
        }
        for name, values in seconds.items()
    }
    return {
        "machine": machine(),
        "versions": versions(),
        "weights": checkpoint(weights),
        "device": device,
        "profile": attached.metrics.profile,
        "calls": calls,
        "tokens": _TOKENS,
        "seconds": seconds,
        "last_to_first": {name: median["last"] / median["first"] for name, median in medians.items()},
        "saved_milliseconds": {
            when: 1000 * (medians["upstream"][when] - medians["ours"][when]) for when in ("first", "last")
        },
        "hooks_of_upstream": {"before": hooks, "after": _hooks(upstream.t3)},
    }


def _hooks(t3: Any) -> int:
    return sum(len(module._forward_hooks) for module in t3.modules())
