"""bench leak: one request after the other, and what the server's processes hold after each few of them.

A growth is that of the medians of the first and the last tenth of the samples, those of the warm-up left out: a start
fills pools and caches, and a single sample catches what is freed a moment later.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import ask, mix
from chatterbox_prewarm.bench.load import target_server
from chatterbox_prewarm.bench.starts import checkpoint, machine, versions
from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.proof.probes import status_field
from chatterbox_prewarm.state.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_prewarm.bench.clients import Target
    from chatterbox_prewarm.bench.server import MeasuredServer

#: More than this is a growth; of what is counted by the dozen, a single one is.
LIMIT = 0.01
#: Of the samples, what is left out at their beginning.
_WARM_UP = 0.2
#: Of each ten requests, the one whose client goes away after the first chunk, and the one before which one is refused.
_LEAVES, _REFUSED = 3, 7
_SAMPLES = 100
#: A connection that was closed is let go of within this, on both sides.
_SETTLE_SECONDS = 0.1
#: What a worker may say of itself in /startupz.
_REPORTED = ("vram_bytes", "hooks")


def run(
    *,
    weights: Path,
    warm: Path,
    device: str,
    requests: int = 500,
    tokens: Sequence[int] = (25, 75, 200),
    seeds: int = 4,
    voice: str = DEFAULT_VOICE,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Sample a server that is started for it while it answers `requests`.

    Args:
        weights: its checkpoint.
        warm: its state.
        device: its device.
        requests: how many; short, medium and long texts, streamed and whole, some refused, some left by their client.
        tokens: the most speech tokens of a short, a medium and a long text.
        seeds: how many different ones.
        voice: of all requests.
        say: called with a line now and then.

    Returns:
        the report: machine, versions, the samples, and for each thing held what `growth` says.

    Raises:
        ModelError: the server was not ready, or did not answer.
    """
    orders = mix(tokens, seeds, voice=voice)
    every = max(1, requests // _SAMPLES)
    samples: list[dict[str, Any]] = []
    with target_server(None, weights=weights, warm=warm, device=device) as (target, server):
        if server is None:
            raise AssertionError("a server is started where no address is given")
        pids = [server.process.pid, *server.workers()]
        started = time.monotonic()
        for number in range(1, requests + 1):
            _one(target, orders[number % len(orders)], number)
            if number % every == 0:
                samples.append({"requests": number, **_sample(target, server)})
            if number % (20 * every) == 0:
                say(f"{number} of {requests} requests, {time.monotonic() - started:.0f} s")
        if pids != [server.process.pid, *server.workers()]:
            raise ModelError("a worker was replaced meanwhile", next_step="see the end of the server's log")
    held = {name: growth([sample[name] for sample in samples]) for name in samples[0] if name != "requests"}
    return {
        "machine": machine(),
        "versions": versions(),
        "device": device,
        "weights": checkpoint(weights),
        "set_digest": read_manifest(warm).set_digest,
        "tokens": list(tokens),
        "seeds": seeds,
        "requests": requests,
        "held": held,
        "flat": all(entry["growth"] <= LIMIT for entry in held.values()),
        "samples": samples,
    }


def _one(target: Target, order: dict[str, Any], number: int) -> None:
    """One request of the run, of every way in which one can end."""
    if number % 10 == _REFUSED:
        refused = ask(target, {**order, "voice": "nobody"}, streamed=False)
        if refused.status not in {400, 404}:
            raise ModelError(f"an unknown voice was answered with {refused.status}", next_step="try it by hand")
    leave = number % 10 == _LEAVES
    answer = ask(target, order, streamed=bool(number % 2) or leave, leave=leave)
    if answer.outcome != "sound":
        raise ModelError(
            f"request {number} was not answered: {answer.status} {answer.text}", next_step="see the server's log"
        )


def _sample(target: Target, server: MeasuredServer) -> dict[str, int]:
    """What front and workers hold; the least of a few looks, since what was just closed may still be counted."""
    looks = []
    for _ in range(3):
        time.sleep(_SETTLE_SECONDS)
        pids = {"front": [server.process.pid], "workers": server.workers()}
        looks.append(
            {
                f"{who} {what}": sum(read(pid) for pid in found)
                for who, found in pids.items()
                for what, read in (("rss_bytes", rss_bytes), ("handles", handles), ("threads", threads))
            }
        )
    sample = {name: min(look[name] for look in looks) for name in looks[0]}
    for name in _REPORTED:
        said = [worker[name] for worker in target.status().get("workers", []) if worker.get(name) is not None]
        if said and (any(said) or name != "vram_bytes"):  # there is none on a CPU
            sample[f"workers {name}"] = sum(said)
    return sample


def rss_bytes(pid: int) -> int:
    """The resident memory of a process, from `/proc/PID/status`."""
    return 1024 * _field(pid, "VmRSS")


def threads(pid: int) -> int:
    """How many threads a process has."""
    return _field(pid, "Threads")


def handles(pid: int) -> int:
    """How many file descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _field(pid: int, name: str) -> int:
    if (value := status_field(pid, name)) is None:
        raise AssertionError(f"the kernel names {name} in /proc/PID/status")
    return value


def growth(values: Sequence[int]) -> dict[str, Any]:
    """How much a series grew, after its warm-up: the median of its last tenth over that of its first, less one."""
    kept = list(values[int(len(values) * _WARM_UP) :])
    tenth = max(1, len(kept) // 10)
    first, last = statistics.median(kept[:tenth]), statistics.median(kept[-tenth:])
    grown = (last - first) / first if first else float(last > first)
    return {"first": first, "last": last, "least": min(kept), "most": max(kept), "growth": round(grown, 5)}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"  {'after ' + str(report['requests']) + ' requests':<24}{'first':>10}{'last':>10}{'growth':>10}"]
    for name, entry in report["held"].items():
        unit = 1e6 if name.endswith("_bytes") else 1
        title = name.replace("rss_bytes", "RSS, MB").replace("vram_bytes", "VRAM, MB")
        shown = "".join(f"{entry[end] / unit:>10.{1 if unit > 1 else 0}f}" for end in ("first", "last"))
        lines.append(f"  {title:<24}{shown}{entry['growth']:>+10.2%}{'' if entry['growth'] <= LIMIT else '  grows'}")
    lines.append("flat" if report["flat"] else f"not flat: more than {LIMIT:.0%} of growth")
    return "\n".join(lines)
