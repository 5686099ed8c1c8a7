"""One fresh process that loads a model through the Python API and speaks a text several times."""

from __future__ import annotations

import itertools
import os
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.starts import SCRATCH
from chatterbox_prewarm.bench.upstream import limit_tokens, load
from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
from chatterbox_prewarm.proof.probes import peak_resident_bytes, status_field
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox
from chatterbox_prewarm.system.json_subprocess import report, run_module
from chatterbox_prewarm.system.metrics import exec_time, now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

UPSTREAM = "upstream"
COLD = "cold"
WARM = "warm"
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class SpeakOptions:
    """Options of the process. They are passed to it as JSON.

    Attributes:
        system: "upstream" without changes, "cold" (our code without a warm state and without a warm-up), or "warm".
        weights: directory of the checkpoint.
        device: torch device.
        warm: directory of the warm state of a warm start.
        policy: policy of a warm start.
        text: text to speak.
        max_new_tokens: maximum number of speech tokens of each request.
        chunk_tokens: speech tokens of each chunk. Upstream returns only complete audio.
        look_ahead: look-ahead of a stream in tokens; None: a stream waits for its last token.
        requests: number of requests, one after the other, each with the same seed.
        speak_once: whether a warm start speaks once before it is ready, as it does by default.
        levels: levels of an additional warm-up.
        second_model: whether to load a second model in this process after the requests.
        memory_limit: limit in bytes of the memory that the process may allocate (RLIMIT_DATA), or None.
    """

    system: str
    weights: str
    device: str = "cpu"
    warm: str | None = None
    policy: str = "require"
    text: str
    max_new_tokens: int
    chunk_tokens: int = 5
    look_ahead: int | None = None
    requests: int = 1
    speak_once: bool = True
    levels: Sequence[int] = ()
    second_model: bool = False
    memory_limit: int | None = None


def speak_in_fresh_process(
    options: SpeakOptions, cache: Path | None = None, *, bytecode: bool = True
) -> dict[str, Any]:
    """Run the process; return the result of `run`.

    Args:
        options: what to load and to speak.
        cache: cache directory for the profile `compiled`, whose state works only with the path of its bake. By default
            an empty directory.
        bytecode: whether the process may use the bytecode next to the sources. A fresh image does not contain it.

    Raises:
        PrewarmError: the process failed, with the error that it reported.
    """
    return run_with_cache("chatterbox_prewarm.bench.speak_process", asdict(options), cache, bytecode=bytecode)


def run_with_cache(
    module: str, arguments: dict[str, Any], cache: Path | None = None, *, bytecode: bool = True
) -> dict[str, Any]:
    """Run a module that takes a cache directory in a fresh process; see `speak_in_fresh_process`.

    Raises:
        PrewarmError: as `run_module`.
    """
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as empty:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        if arguments.get("system") == UPSTREAM:
            environment["NUMBA_CACHE_DIR"] = empty
        if not bytecode:
            environment["PYTHONPYCACHEPREFIX"] = f"{empty}/pycache"  # a start refuses a family's folder
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return run_module(module, {**arguments, "cache": str(cache or empty)}, env=environment)


def run(*, cache: str, **fields: Any) -> dict[str, Any]:
    """Load the model and speak.

    Args:
        cache: an empty cache directory.
        **fields: the fields of `SpeakOptions`.

    Returns:
        `attached`, `ready` and `first_audio` in seconds since exec; `requests` with the result of `_speak` for each;
        `peak_bytes`, `allocated_bytes` and `peak_gpu_bytes` of the process after the first request; `hits` and
        `misses`; `second_model`: the seconds from the call that loads a second model to the end of its first request.
    """
    options = SpeakOptions(**fields)
    if options.memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory_limit, options.memory_limit))
    result: dict[str, Any] = {}
    model, counters = _load(options, cache, result)
    requests = [_speak(model, options)]
    result["first_audio"] = _since_exec()
    result |= _memory(options.device)
    requests += [_speak(model, options) for _ in range(options.requests - 1)]
    result |= {"requests": requests, **counters()}
    del model
    if options.second_model:
        started = time.monotonic()
        _speak(_load(options, cache, {})[0], options)
        result["second_model"] = time.monotonic() - started
    return result


def _load(options: SpeakOptions, cache: str, marks: dict[str, Any]) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Load and warm up a model; record `attached` and `ready` in `marks`.

    Returns:
        the model, and a function that returns its hits and misses.
    """
    if options.system == UPSTREAM:
        model = load(options.weights, options.device)
        limit_tokens(model, options.max_new_tokens)
        marks["attached"] = marks["ready"] = _since_exec()
        return model, lambda: {"hits": {}, "misses": {}}
    warm = options.system == WARM
    model = PrewarmedChatterbox.from_pretrained_with_warmup(
        options.device,
        warmup=warm and options.speak_once,
        weights=options.weights,
        warm=options.warm if warm else os.devnull,
        cache=cache,
        policy=options.policy if warm else "off",
    )
    if options.levels:
        ChatterboxWarmupStrategy(levels=options.levels).perform_full_warmup(model)
    marks |= {"attached": model.metrics.marks["attached"], "ready": _since_exec()}
    log = model.metrics  # not the model, which must be freed before the second one is loaded
    return model, lambda: {name: log.to_dict()[name] for name in ("hits", "misses")}


def _speak(model: Any, options: SpeakOptions) -> dict[str, Any]:
    """Send one request.

    Returns:
        `seconds` to the end of the audio and `first_chunk`, both since the call; the seconds between the chunks
        (`gaps`), of which upstream has one; `audio`, the seconds of audio.
    """
    if options.system == UPSTREAM:
        from chatterbox_prewarm.model.synthesis import seed_everything

        seed_everything(_SEED)
        started = time.monotonic()
        samples = model.generate(options.text).shape[-1]
        seconds = time.monotonic() - started
        return {"seconds": seconds, "first_chunk": seconds, "gaps": [], "audio": samples / model.sr}
    started = time.monotonic()
    arrivals, samples = [], 0
    for chunk in model.generate_stream(
        options.text,
        seed=_SEED,
        max_new_tokens=options.max_new_tokens,
        chunk_tokens=options.chunk_tokens,
        look_ahead=options.look_ahead,
    ):
        arrivals.append(time.monotonic() - started)
        samples += len(chunk.samples)
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return {"seconds": arrivals[-1], "first_chunk": arrivals[0], "gaps": gaps, "audio": samples / model.sr}


def _since_exec() -> float:
    return now() - exec_time()


def _memory(device: str) -> dict[str, int]:
    """Return peak resident memory, allocated memory (VmData) and peak GPU memory of this process in bytes."""
    import torch

    return {
        "peak_bytes": peak_resident_bytes(),
        "allocated_bytes": 1024 * (status_field(os.getpid(), "VmData") or 0),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0,
    }


if __name__ == "__main__":
    report(run)
