"""`bench load`: send requests from concurrent clients and compare each audio with the same request without load."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import Target, livez_probe, make_requests, request_speech
from chatterbox_prewarm.bench.room import check_memory
from chatterbox_prewarm.bench.server import measured_server
from chatterbox_prewarm.bench.starts import SCRATCH, machine, setup, versions
from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.system.paths import WARM, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chatterbox_prewarm.bench.clients import Answer
    from chatterbox_prewarm.bench.server import MeasuredServer

#: Outcomes that must not occur at any load.
FAULTS = ("lost", "failed", "cut", "wrong")
_PERCENTILES = (50, 90, 99)
_HEADS = ("clients", "answers", "p50", "p90", "p99", "chunk p50", "chunk p99", "sound/s", "in time", "livez p99")
#: Queue places of the server in addition to one for each client.
_SPARE_QUEUE_PLACES = 8


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of a benchmark that sends requests to a server.

    Attributes:
        url: address of a running server. If it is None, the benchmark starts a server.
        weights: checkpoint of the started server.
        warm: warm state of the started server.
        device: device of the started server.
        clients: numbers of concurrent clients, measured one after the other.
        requests: requests of each client.
        tokens: limits of speech tokens for a short, a medium and a long text.
        seeds: number of different seeds.
        voice: voice of all requests.
        look_ahead: look-ahead of all requests in tokens. None: a stream waits for its last token.
    """

    url: str | None = None
    weights: Path = WEIGHTS
    warm: Path = WARM
    device: str = "cpu"
    clients: Sequence[int] = (1, 4, 16)
    requests: int = 20
    tokens: Sequence[int] = (25, 75, 200)
    seeds: int = 4
    voice: str = DEFAULT_VOICE
    look_ahead: int | None = None

    def bodies(self) -> list[dict[str, Any]]:
        """Make the request bodies that the clients use in turn."""
        return make_requests(self.tokens, self.seeds, voice=self.voice, look_ahead=self.look_ahead)

    def describe(self) -> dict[str, Any]:
        """Describe the machine, the software, the requests, and the server if the benchmark starts it."""
        host = {"machine": machine(), "versions": versions()}
        server = setup(self.weights, self.warm, self.device) if self.url is None else host
        return {**server, "tokens": list(self.tokens), "seeds": self.seeds, "look_ahead": self.look_ahead}


def run(
    options: LoadOptions, *, say: Callable[[str], None], save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure a server under load.

    Args:
        options: the server and the requests.
        say: called with one line for each step.
        save: called with the report before the first number of clients and after each one, and at the end, when its
            `complete` is true.

    Returns:
        the report: `complete`, machine, versions, for each number of clients the result of `summarize`, and the peak
        resident memory of the server's processes if the benchmark started it.

    Raises:
        BadInputError: there is too little memory for the server.
        ModelError: the server was not ready, or a request without load failed.
    """
    bodies = options.bodies()
    if options.url is None:
        workers = len(options.device.split(","))
        check_memory(options.weights, purpose=f"a server with {workers} worker(s)", processes=workers)
    with contextlib.ExitStack() as stack:
        server = None
        if options.url:
            target = Target.parse(options.url)
        else:
            server = stack.enter_context(started_server(options))
            target = server.target
        report = {"complete": False, **options.describe(), "start": start_of(target)}
        say(f"{len(bodies)} requests without load, as the reference")
        unloaded = speak_in_sequence(target, bodies, streamed=True)
        report["alone"] = {
            "latency": percentiles([answer.latency for answer in unloaded]),
            "first_chunk": percentiles([answer.first_chunk for answer in unloaded]),
        }
        expected = [answer.digest for answer in unloaded]
        report["levels"] = []
        save(report)  # an older report must not look like the result of this run
        for clients in options.clients:
            say(f"{clients} client(s), {options.requests} requests each")
            report["levels"].append(_level(target, bodies, expected, clients=clients, requests=options.requests))
            save(report)
        if server is not None:
            report["resident_bytes"] = server.resident_bytes()
    report["complete"] = True
    save(report)
    return report


@contextlib.contextmanager
def started_server(options: LoadOptions) -> Iterator[MeasuredServer]:
    """Start a server from a warm state, wait until it is ready, and end it afterwards."""
    queue = max(32, max(options.clients) + _SPARE_QUEUE_PLACES)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        arguments = [
            *("--weights", str(options.weights), "--warm", str(options.warm), "--cache", f"{scratch}/cache"),
            # The latency includes the wait in the queue, so the server must not refuse a request for waiting too long.
            *("--policy", "require", "--device", options.device, "--queue-limit", str(queue), "--queue-seconds", "600"),
        ]
        with measured_server(arguments, log=Path(scratch) / "log") as server:
            server.wait_ready()
            yield server


def start_of(target: Target) -> dict[str, Any]:
    """Return the figures that a server reports about its start."""
    status = target.status()
    return {name: status.get(name) for name in ("marks", "hits", "misses", "profile")}


def speak_in_sequence(target: Target, bodies: Sequence[dict[str, Any]], *, streamed: bool) -> list[Answer]:
    """Send the requests one after the other.

    Raises:
        ModelError: a request failed.
    """
    answers = [request_speech(target, body, streamed=streamed) for body in bodies]
    for answer in answers:
        if answer.outcome != "sound":
            raise ModelError(
                f"a request without load failed: {answer.status} {answer.text}", next_step="see the log of the server"
            )
    return answers


def _level(
    target: Target, bodies: Sequence[dict[str, Any]], expected: Sequence[str], *, clients: int, requests: int
) -> dict[str, Any]:
    def client(number: int) -> list[tuple[Answer, bool]]:
        answers = []
        for turn in range(requests):
            index = (number + turn) % len(bodies)  # each client begins with another request
            answer = request_speech(target, bodies[index], streamed=True)
            answers.append((answer, answer.digest == expected[index]))
        return answers

    with livez_probe(target) as probes, ThreadPoolExecutor(clients) as pool:
        started = time.monotonic()
        answers = [pair for pairs in pool.map(client, range(clients)) for pair in pairs]
        seconds = time.monotonic() - started
    latencies = [latency for _, latency in probes if latency is not None]
    livez = {**percentiles(latencies), "count": len(latencies), "failed": len(probes) - len(latencies)}
    return {"clients": clients, "requests": requests, **summarize(answers, seconds), "livez": livez}


def summarize(answers: Sequence[tuple[Answer, bool]], seconds: float) -> dict[str, Any]:
    """Summarize the answers of one number of clients.

    Args:
        answers: each answer, and whether its audio is as expected.
        seconds: duration of the run.
    """
    spoken = [answer for answer, _ in answers if answer.outcome == "sound"]
    sound = sum(answer.sound_seconds for answer in spoken)
    return {
        "seconds": round(seconds, 3),
        **count_outcomes(answers),
        "latency": percentiles([answer.latency for answer in spoken]),
        "first_chunk": percentiles([answer.first_chunk for answer in spoken]),
        "sound_seconds": round(sound, 2),
        "throughput": round(sound / seconds, 3),
        "in_time": sum(answer.behind <= 0 for answer in spoken),
        "spoken": len(spoken),
    }


def count_outcomes(answers: Sequence[tuple[Answer, bool]]) -> dict[str, Any]:
    """Count the answers by status and by outcome, and collect up to ten different messages.

    Args:
        answers: each answer, and whether its audio is as expected.
    """
    outcomes = Counter(answer.outcome for answer, _ in answers)
    return {
        "statuses": dict(sorted(Counter(str(answer.status) for answer, _ in answers).items())),
        **{name: outcomes[name] for name in ("refused", "lost", "failed", "cut")},
        "wrong": sum(answer.outcome == "sound" and not correct for answer, correct in answers),
        "texts": sorted({answer.text for answer, _ in answers if answer.text})[:10],
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the nearest-rank percentiles and the maximum in the unit of `values`; empty if there are no values."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in _PERCENTILES}
    return {name: round(value, 4) for name, value in {**ranks, "most": ordered[-1]}.items()}


def faults(report: dict[str, Any]) -> list[str]:
    """Return one message for each kind of fault in a report."""
    messages = []
    for level in report["levels"]:
        title = f"{level['clients']} client(s)"
        messages += [f"{title}: {level[name]} {name}" for name in FAULTS if level[name]]
        if level["livez"]["failed"]:
            messages.append(f"{title}: {level['livez']['failed']} probes of /livez failed")
    return messages


def table(report: dict[str, Any]) -> str:
    """Format the report: latency and time to the first chunk in seconds, seconds of audio per second."""
    rows: list[tuple[str, ...]] = [_HEADS]
    for level in report["levels"]:
        latency, chunk = level["latency"], level["first_chunk"]
        rows.append(
            (
                str(level["clients"]),
                statuses(level),
                *(_seconds(latency.get(name)) for name in ("p50", "p90", "p99")),
                *(_seconds(chunk.get(name)) for name in ("p50", "p99")),
                f"{level['throughput']:.2f}",
                f"{level['in_time']}/{level['spoken']}",
                f"{1000 * level['livez'].get('p99', 0):.1f} ms",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("; ".join(faults(report)) or "no request was lost or failed, and every audio was correct")
    return "\n".join(lines)


def statuses(counts: dict[str, Any]) -> str:
    """Format the number of answers of each status."""
    return ", ".join(f"{status}: {count}" for status, count in counts["statuses"].items())


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
