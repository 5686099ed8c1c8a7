"""`benchmarks leak`: send requests one after the other and sample the resources of the server's processes.

Growth is the median of the last tenth of the samples relative to the median of their first tenth. The samples of the
warm-up are ignored, because a start fills pools and caches. A median is used because a single sample may include a
resource that is about to be released.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import request_speech
from chatterbox_prewarm.bench.load import started_server
from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.proof.probes import status_field
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import get_variant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_prewarm.bench.clients import Target
    from chatterbox_prewarm.bench.load import LoadOptions
    from chatterbox_prewarm.bench.server import MeasuredServer
    from chatterbox_prewarm.weights.variants import Variant

#: A larger relative growth is a leak. There are so few handles and threads that a single new one exceeds the limit.
LIMIT = 0.01
#: Share of the samples that belongs to the warm-up.
_WARM_UP = 0.2
#: In every ten requests, one client disconnects after the first chunk, and one request follows an invalid request.
_DISCONNECTED, _AFTER_INVALID = 3, 7
_SAMPLES = 100
#: Both sides have released a closed connection after this time.
_SETTLE_SECONDS = 0.1
#: Figures of a worker in /startupz.
_REPORTED = ("vram_bytes",)


def run(options: LoadOptions, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Start a server and sample it while it answers `options.requests` requests.

    Streamed and complete responses alternate. Some requests are invalid, and some clients disconnect early.

    Args:
        options: the server and the requests.
        say: called with a line of progress from time to time.

    Returns:
        the report: machine, versions, the samples, and the result of `growth` for each resource.

    Raises:
        ModelError: the server was not ready, did not answer, or replaced a worker.
    """
    bodies = _in_all_languages(options.bodies(), get_variant(read_record(options.weights).variant))
    period = max(1, options.requests // _SAMPLES)
    samples: list[dict[str, Any]] = []
    with started_server(options) as server:
        pids = [server.process.pid, *server.workers()]
        started = time.monotonic()
        for number in range(1, options.requests + 1):
            _send(server.target, bodies[number % len(bodies)], number)
            if number % period == 0:
                samples.append({"requests": number, **_sample(server)})
            if number % (20 * period) == 0:
                say(f"{number} of {options.requests} requests, {time.monotonic() - started:.0f} s")
        if pids != [server.process.pid, *server.workers()]:
            raise ModelError("the server replaced a worker during the run", next_step="see the end of its log")
    held = {name: growth([sample[name] for sample in samples]) for name in samples[0] if name != "requests"}
    return {
        **options.describe(),
        "requests": options.requests,
        "held": held,
        "flat": all(entry["growth"] <= LIMIT for entry in held.values()),
        "samples": samples,
    }


def _in_all_languages(bodies: list[dict[str, Any]], variant: Variant) -> list[dict[str, Any]]:
    """Give each request another language if the model has several."""
    if len(variant.samples) < 2:
        return bodies
    return [
        {**bodies[number % len(bodies)], "input": text, "language": language}
        for number, (language, text) in enumerate(variant.samples.items())
    ]


def _send(target: Target, body: dict[str, Any], number: int) -> None:
    """Send one request of the run, and an invalid one before some of them."""
    if number % 10 == _AFTER_INVALID:
        refused = request_speech(target, {**body, "voice": "missing"}, streamed=False)
        if refused.status not in {400, 404}:
            raise ModelError(
                f"a request for an unknown voice returned {refused.status}, not 400 or 404",
                next_step="see the log of the server",
            )
    disconnect = number % 10 == _DISCONNECTED
    answer = request_speech(target, body, streamed=bool(number % 2) or disconnect, disconnect=disconnect)
    if answer.outcome != "sound":
        raise ModelError(
            f"request {number} failed: {answer.status} {answer.text}", next_step="see the log of the server"
        )


def _sample(server: MeasuredServer) -> dict[str, int]:
    """Sample the front process and the workers.

    The minimum of three measurements is used, because a resource that was just closed may still be counted.
    """
    measurements = []
    for _ in range(3):
        time.sleep(_SETTLE_SECONDS)
        processes = {"front": [server.process.pid], "workers": server.workers()}
        measurements.append(
            {
                f"{name} {resource}": sum(read(pid) for pid in pids)
                for name, pids in processes.items()
                for resource, read in (("rss_bytes", rss_bytes), ("handles", handles), ("threads", threads))
            }
        )
    sample = {name: min(measurement[name] for measurement in measurements) for name in measurements[0]}
    workers = server.target.status().get("workers", [])
    for name in _REPORTED:
        values = [worker[name] for worker in workers if worker.get(name) is not None]
        if values and (any(values) or name != "vram_bytes"):  # a CPU has no VRAM
            sample[f"workers {name}"] = sum(values)
    return sample


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process from `/proc/PID/status`."""
    return 1024 * _field(pid, "VmRSS")


def threads(pid: int) -> int:
    """Return the number of threads of a process."""
    return _field(pid, "Threads")


def handles(pid: int) -> int:
    """Return the number of open file descriptors of a process."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _field(pid: int, name: str) -> int:
    if (value := status_field(pid, name)) is None:
        raise AssertionError(f"/proc/PID/status has no field {name}")
    return value


def growth(values: Sequence[int]) -> dict[str, Any]:
    """Compute the relative growth of a series after its warm-up, between the medians of its first and last tenth."""
    kept = list(values[int(len(values) * _WARM_UP) :])
    tenth = max(1, len(kept) // 10)
    first, last = statistics.median(kept[:tenth]), statistics.median(kept[-tenth:])
    grown = (last - first) / first if first else float(last > first)
    return {"first": first, "last": last, "least": min(kept), "most": max(kept), "growth": round(grown, 5)}


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    lines = [f"  {'after ' + str(report['requests']) + ' requests':<24}{'first':>10}{'last':>10}{'growth':>10}"]
    for name, entry in report["held"].items():
        unit = 1e6 if name.endswith("_bytes") else 1
        title = name.replace("rss_bytes", "RSS, MB").replace("vram_bytes", "VRAM, MB")
        shown = "".join(f"{entry[end] / unit:>10.{1 if unit > 1 else 0}f}" for end in ("first", "last"))
        lines.append(f"  {title:<24}{shown}{entry['growth']:>+10.2%}{'' if entry['growth'] <= LIMIT else '  grows'}")
    lines.append("flat" if report["flat"] else f"not flat: a resource grew by more than {LIMIT:.0%}")
    return "\n".join(lines)
