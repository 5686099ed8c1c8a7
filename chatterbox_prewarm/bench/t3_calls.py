"""One fresh process that calls T3 many times, upstream's and ours in turn.

A stream with `look_ahead` sends its first chunk after the first speech tokens, so the difference of two calls is time
to the first chunk. Each call of upstream's Multilingual T3 adds hooks to the layers that its alignment analyzer
watches. These hooks are never removed.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.warmup.settings import SHORT_TEXT
from chatterbox_prewarm.start.attach import load_warmup_cache
from chatterbox_prewarm.system.json_subprocess import report
from chatterbox_prewarm.system.progress import detail

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Speech tokens of a call.
TOKENS = 8
#: The number of calls at the beginning, without the first one, and at the end whose medians are compared.
_COMPARED = 5
#: Least number of calls, so that no call belongs to both groups.
MIN_CALLS = 2 * _COMPARED + 1


def run(*, weights: str, warm: str, cache: str, device: str, calls: int, policy: str = "require") -> dict[str, Any]:
    """Call our T3 and upstream's in turn.

    Args:
        weights: directory of the checkpoint.
        warm: a warm state.
        cache: a writable directory.
        device: a torch device.
        calls: the number of calls of each, at least `MIN_CALLS`.
        policy: what to do with a state that does not fit. With "fallback", a state of other weights works, too, because
            its compiled regions fit.

    Returns:
        `seconds` of all calls of each system; `first` and `last`, the medians in seconds of the calls 2 to 6 and of the
        last five; the number of `hooks` in upstream's T3 before and after all calls; our `profile`.

    Raises:
        BadInputError: our T3 is not in float32. Upstream's T3 shares its tensors, and cannot run then.
        PrewarmError: as `load_warmup_cache`.
    """
    attached = load_warmup_cache(warm, weights, cache=cache, device=device, policy=policy)
    if attached.prepared.execution.t3_dtype != "float32":
        raise BadInputError(
            f"upstream's T3 cannot run in {attached.prepared.execution.t3_dtype}", next_step="give a state in float32"
        )

    import torch

    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.variants import code_of
    from chatterbox_prewarm.model.voices import for_upstream
    from chatterbox_prewarm.start.upstream import attach_upstream

    synthesizer = attached.synthesizer
    variant, sampling = synthesizer.model.variant, synthesizer.model.sampling
    code = code_of(variant)
    upstream = attach_upstream(attached.prepared, lean=synthesizer.model)
    conditionals = for_upstream(synthesizer.voices[DEFAULT_VOICE]).t3
    text = code.upstream_text_ids(upstream, SHORT_TEXT, variant.check_language(None))

    @torch.inference_mode()
    def call_upstream() -> None:
        code.upstream_speech_tokens(upstream, conditionals, text, sampling=sampling, max_new_tokens=TOKENS)

    def call_ours() -> None:
        for _ in synthesizer.token_blocks(SHORT_TEXT, max_new_tokens=TOKENS):
            pass

    systems: dict[str, Callable[[], None]] = {"ours": call_ours, "upstream": call_upstream}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    hooks = [_hooks(upstream.t3)]
    for number in range(1, calls + 1):
        for name, call in systems.items():
            seed_everything(0)
            started = _now(device)
            call()
            seconds[name].append(_now(device) - started)
        detail(f"{number} of {calls} calls", passing=True, share=number / calls)
    return {
        "profile": attached.metrics.profile,
        "seconds": seconds,
        "first": {name: statistics.median(values[1 : 1 + _COMPARED]) for name, values in seconds.items()},
        "last": {name: statistics.median(values[-_COMPARED:]) for name, values in seconds.items()},
        "hooks": [*hooks, _hooks(upstream.t3)],
    }


def saved_milliseconds(seconds: Mapping[str, Sequence[float]]) -> float:
    """Return by how many milliseconds our tokens come earlier than upstream's: the median of all pairs but the first.

    Args:
        seconds: as in the result of `run`.
    """
    return 1000 * statistics.median(upstream - ours for ours, upstream in later_pairs(seconds))


def later_pairs(seconds: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    """Return the seconds of our call and of upstream's for each pair but the first, which is not warm."""
    return list(zip(seconds["ours"], seconds["upstream"], strict=True))[1:]


def _now(device: str) -> float:
    """Return the time in seconds when the device has done its work."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def _hooks(t3: Any) -> int:
    return sum(len(module._forward_hooks) for module in t3.modules())


if __name__ == "__main__":
    report(run)
