"""bench load: concurrent clients against one server. Every answer's sound is compared with the same request's alone."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kill import kill_worker
from chatterbox_prewarm.bench.clients import LivezProbe, Target, ask, mix
from chatterbox_prewarm.bench.server import MeasuredServer, measured_server
from chatterbox_prewarm.bench.starts import checkpoint, machine, versions
from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.state.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chatterbox_prewarm.bench.clients import Answer

#: What must not happen to a request, whatever the load.
FAULTS = ("lost", "failed", "cut", "wrong")
_PERCENTILES = (50, 90, 99)
_HEADS = ("clients", "answers", "p50", "p90", "p99", "chunk p50", "chunk p99", "sound/s", "in time", "livez p99")
#: Places in the queue of a server that is started here, besides those that the clients take.
_QUEUE_SPARE = 8


def run(
    *,
    url: str | None,
    weights: Path,
    warm: Path,
    device: str,
    clients: Sequence[int] = (1, 4, 16),
    requests: int = 20,
    tokens: Sequence[int] = (25, 75, 200),
    seeds: int = 4,
    voice: str = DEFAULT_VOICE,
    look_ahead: int | None = None,
    kill_after: float | None = None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a server under load.

    Args:
        url: a server that runs; without one, a server is started from `warm` and `weights`.
        weights: the checkpoint of a server that is started.
        warm: its state.
        device: its device.
        clients: how many at a time, one level after the other.
        requests: of each client.
        tokens: the most speech tokens of a short, a medium and a long text.
        seeds: how many different ones.
        voice: of all requests.
        look_ahead: of all requests, in tokens; None has each stream wait for its last token.
        kill_after: seconds of load after which a worker is killed, in a run of its own after the others.
        say: called with a line for each step.

    Returns:
        the report: machine, versions, and for each level what `summarize` says.

    Raises:
        BadInputError: a worker of a server that was not started here cannot be killed.
        ModelError: the server was not ready, or refused a request that came alone.
    """
    if kill_after is not None and url is not None:
        raise BadInputError(
            "--kill-worker-after is for a server that the bench starts itself", next_step="leave --url out"
        )
    orders = mix(tokens, seeds, voice=voice, look_ahead=look_ahead)
    report: dict[str, Any] = {"machine": machine(), "versions": versions(), "tokens": list(tokens), "seeds": seeds}
    report["look_ahead"] = look_ahead
    queue = max(32, *(count + _QUEUE_SPARE for count in clients))
    with target_server(url, weights=weights, warm=warm, device=device, queue=queue) as (target, server):
        if server is not None:
            report |= {"device": device, "weights": checkpoint(weights), "set_digest": read_manifest(warm).set_digest}
        first = target.status()
        report["start"] = {name: first.get(name) for name in ("marks", "hits", "misses", "profile")}
        say(f"{len(orders)} requests alone, whose sound is what the others are compared with")
        alone = _alone(target, orders, streamed=True)
        report["alone"] = {
            "latency": percentiles([answer.latency for answer in alone]),
            "first_chunk": percentiles([answer.first_chunk for answer in alone]),
        }
        expected = [answer.digest for answer in alone]
        report["levels"] = [
            _level(target, orders, expected, clients=count, requests=requests, say=say) for count in clients
        ]
        if kill_after is not None and server is not None:
            whole = [answer.digest for answer in _alone(target, orders, streamed=False)]
            say(f"{max(clients)} clients, a worker killed after {kill_after:g} s")
            report["kill"] = kill_worker(
                server,
                target,
                orders,
                {True: expected, False: whole},
                clients=max(clients),
                requests=requests,
                after=kill_after,
                first_start=first["marks"]["ready"],
            )
    return report


@contextlib.contextmanager
def target_server(
    url: str | None, *, weights: Path, warm: Path, device: str, queue: int = 32
) -> Iterator[tuple[Target, MeasuredServer | None]]:
    """The server at `url`, or one that is started from a warm state and ended afterwards."""
    if url is not None:
        yield Target.parse(url), None
        return
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-bench-") as scratch:
        arguments = [
            *("--weights", str(weights), "--warm", str(warm), "--cache", f"{scratch}/cache", "--policy", "require"),
            # Who waits is counted by how long: none is to be turned away.
            *("--device", device, "--queue-limit", str(queue), "--queue-seconds", "600"),
        ]
        with measured_server(arguments, log=Path(scratch) / "log") as server:
            server.wait_ready()
            yield Target(secure=False, host="127.0.0.1", port=server.port), server


def _alone(target: Target, orders: Sequence[dict[str, Any]], *, streamed: bool) -> list[Answer]:
    answers = [ask(target, order, streamed=streamed) for order in orders]
    for answer in answers:
        if answer.outcome != "sound":
            raise ModelError(
                f"a request alone was not answered: {answer.status} {answer.text}", next_step="see the server's log"
            )
    return answers


def _level(
    target: Target,
    orders: Sequence[dict[str, Any]],
    expected: Sequence[str],
    *,
    clients: int,
    requests: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    say(f"{clients} client(s), {requests} requests each")

    def client(number: int) -> list[tuple[Answer, bool]]:
        seen = []
        for turn in range(requests):
            which = (number + turn) % len(orders)  # every client in another place of the mix
            answer = ask(target, orders[which], streamed=True)
            seen.append((answer, answer.digest == expected[which]))
        return seen

    with LivezProbe(target) as probe, ThreadPoolExecutor(clients) as pool:
        started = time.monotonic()
        answers = [pair for found in pool.map(client, range(clients)) for pair in found]
        seconds = time.monotonic() - started
    return {"clients": clients, "requests": requests, **summarize(answers, seconds, probe)}


def summarize(answers: Sequence[tuple[Answer, bool]], seconds: float, probe: LivezProbe) -> dict[str, Any]:
    """What a level's answers amount to.

    Args:
        answers: each with whether its sound is the right one.
        seconds: that the level took.
        probe: of `/livez`, meanwhile.
    """
    spoken = [answer for answer, _ in answers if answer.outcome == "sound"]
    outcomes = Counter(answer.outcome for answer, _ in answers)
    sound = sum(answer.sound_seconds for answer in spoken)
    return {
        "seconds": round(seconds, 3),
        "statuses": dict(sorted(Counter(str(answer.status) for answer, _ in answers).items())),
        **{name: outcomes[name] for name in ("refused", "lost", "failed", "cut")},
        "wrong": sum(answer.outcome == "sound" and not right for answer, right in answers),
        "texts": sorted({answer.text for answer, _ in answers if answer.text})[:10],
        "latency": percentiles([answer.latency for answer in spoken]),
        "first_chunk": percentiles([answer.first_chunk for answer in spoken]),
        "sound_seconds": round(sound, 2),
        "throughput": round(sound / seconds, 3),
        "in_time": sum(answer.behind <= 0 for answer in spoken),
        "spoken": len(spoken),
        "livez": {**percentiles(probe.seconds), "count": len(probe.seconds), "failed": probe.failed},
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The nearest-rank percentiles and the largest value, in the unit of `values`; empty without any."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in _PERCENTILES}
    return {name: round(value, 4) for name, value in {**ranks, "most": ordered[-1]}.items()}


def faults(report: dict[str, Any]) -> list[str]:
    """What went wrong that must not, in words; after a killed worker, a stream that had begun may have broken off."""
    found = []
    for level in report["levels"]:
        title = f"{level['clients']} client(s)"
        found += [f"{title}: {level[name]} {name}" for name in FAULTS if level[name]]
        if level["livez"]["failed"]:
            found.append(f"{title}: {level['livez']['failed']} probes of /livez failed")
    if kill := report.get("kill"):
        found += [f"a killed worker: {kill[name]} {name}" for name in FAULTS if name != "cut" and kill[name]]
        if kill["whole_cut"]:
            found.append(f"a killed worker: {kill['whole_cut']} whole answers cut")
        if kill["ready_again"] is None:
            found.append("a killed worker: not ready again")
        if kill["livez_failed"]:
            found.append(f"a killed worker: {kill['livez_failed']} probes of /livez failed")
        if kill["misses"]:
            missed = ", ".join(f"{count} of {family}" for family, count in sorted(kill["misses"].items()))
            found.append(f"a killed worker: misses of the new start: {missed}")
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people: latency and time to the first chunk in seconds, sound in seconds a second."""
    rows: list[tuple[str, ...]] = [_HEADS]
    for level in report["levels"]:
        latency, chunk = level["latency"], level["first_chunk"]
        rows.append(
            (
                str(level["clients"]),
                _answers(level),
                *(_shown(latency.get(name)) for name in ("p50", "p90", "p99")),
                *(_shown(chunk.get(name)) for name in ("p50", "p99")),
                f"{level['throughput']:.2f}",
                f"{level['in_time']}/{level['spoken']}",
                f"{1000 * level['livez'].get('p99', 0):.1f} ms",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    if kill := report.get("kill"):
        first = kill["first_start"]
        again = "never" if kill["ready_again"] is None else f"{kill['ready_again']:.2f} s after it"
        lines += [
            f"a worker killed after {kill['after']:g} s: ready again {again}; the first start: {first:.2f} s",
            f"  answers: {_answers(kill)}; {kill['refused']} refused cleanly, {kill['cut']} streams broken off",
        ]
    found = faults(report)
    lines.append("; ".join(found) if found else "no request lost, none failed, every sound the right one")
    return "\n".join(lines)


def _answers(level: dict[str, Any]) -> str:
    return ", ".join(f"{status}: {count}" for status, count in level["statuses"].items())


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
