"""`benchmarks kill`: kill a worker under load. Each request must get its audio or a clean refusal."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import livez_probe, request_speech
from chatterbox_prewarm.bench.load import FAULTS, count_outcomes, speak_in_sequence, start_of, started_server, statuses
from chatterbox_prewarm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chatterbox_prewarm.bench.clients import Answer
    from chatterbox_prewarm.bench.load import LoadOptions
    from chatterbox_prewarm.bench.server import MeasuredServer

#: Seconds to wait until the server is ready again, which is longer than any start.
_RECOVERY_TIMEOUT = 600.0
#: Seconds that a refused client waits before it retries. Retry-After asks for more, which suits clients that do
#: something else in the meantime.
_RETRY_DELAY = 0.25
_POLL_SECONDS = 0.02


def run(options: LoadOptions, *, after: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Start a server and kill one of its workers while clients send requests.

    Half of the requests are streamed. Each client continues until it has received all its audio and the server is ready
    again.

    Args:
        options: the server and the requests. The largest number of clients is used.
        after: seconds of load before the worker is killed.
        say: called with one line for each step.

    Returns:
        the report: machine, versions, the first start, and in `kill` the outcomes and the recovery.

    Raises:
        ModelError: the server was not ready, a request without load failed, or there was no worker to kill.
    """
    bodies = options.bodies()
    with started_server(options) as server:
        report = options.describe() | {"start": start_of(server.target)}
        say(f"{2 * len(bodies)} requests without load, as the reference")
        expected = {
            streamed: [answer.digest for answer in speak_in_sequence(server.target, bodies, streamed=streamed)]
            for streamed in (True, False)
        }
        say(f"{max(options.clients)} clients; a worker is killed after {after:g} s")
        report["kill"] = {
            "first_start": report["start"]["marks"]["ready"],
            **_kill_under_load(server, options, expected, after),
        }
    return report


def _kill_under_load(
    server: MeasuredServer, options: LoadOptions, expected: Mapping[bool, Sequence[str]], after: float
) -> dict[str, Any]:
    """Kill a worker while clients send requests; return the outcomes and the recovery.

    Args:
        server: the server.
        options: the requests.
        expected: digests of the streamed and of the complete responses.
        after: seconds of load before the worker is killed.
    """
    bodies, clients, target = options.bodies(), max(options.clients), server.target
    recovered, give_up = threading.Event(), time.monotonic() + after + _RECOVERY_TIMEOUT

    def client(number: int) -> list[tuple[Answer, bool, bool]]:
        answers: list[tuple[Answer, bool, bool]] = []
        spoken = 0
        while (spoken < options.requests or not recovered.is_set()) and time.monotonic() < give_up:
            index, streamed = (number + len(answers)) % len(bodies), bool(len(answers) % 2)
            answer = request_speech(target, bodies[index], streamed=streamed)
            answers.append((answer, answer.digest == expected[streamed][index], streamed))
            if answer.outcome == "sound":
                spoken += 1
            else:
                time.sleep(_RETRY_DELAY)
        return answers

    with livez_probe(target) as probes, ThreadPoolExecutor(clients + 1) as pool:
        killing = pool.submit(_kill_and_wait, server, after, recovered)
        answers = [entry for entries in pool.map(client, range(clients)) for entry in entries]
        recovery = killing.result()
    return {
        "clients": clients,
        "after": after,
        **count_outcomes([(answer, correct) for answer, correct, _ in answers]),
        "sound": sum(answer.outcome == "sound" for answer, _, _ in answers),
        "whole_cut": sum(answer.outcome == "cut" and not streamed for answer, _, streamed in answers),
        **recovery,
        "livez_most": round(max((latency for _, latency in probes if latency is not None), default=0.0), 4),
        "livez_failed": sum(latency is None for _, latency in probes),
    }


def _kill_and_wait(server: MeasuredServer, after: float, recovered: threading.Event) -> dict[str, Any]:
    """Kill a worker after `after` seconds and wait until all workers are ready again.

    `recovered` is set at the end, also if the server did not recover.

    Returns:
        ready_again: seconds from the kill until the server was ready; None if it was not.
        misses: cache misses of the new start.
    """
    try:
        time.sleep(after)
        restarts = server.target.status()["restarts"]
        workers = server.workers()
        if not workers:
            raise ModelError("the server has no worker to kill", next_step="see the end of its log")
        os.kill(workers[0], signal.SIGKILL)
        killed = time.monotonic()
        while time.monotonic() < killed + _RECOVERY_TIMEOUT and server.process.poll() is None:
            status = server.target.status()
            all_ready = status["ready"] and all(worker["ready"] for worker in status.get("workers", []))
            if status["restarts"] > restarts and all_ready:
                return {"ready_again": round(time.monotonic() - killed, 3), "misses": status.get("misses", {})}
            time.sleep(_POLL_SECONDS)
        return {"ready_again": None, "misses": {}}
    finally:
        recovered.set()


def faults(report: dict[str, Any]) -> list[str]:
    """Return one message for each kind of fault.

    A stream that breaks off is not a fault, because its client sees it. A complete response that breaks off is one.
    """
    kill = report["kill"]
    messages = [f"{kill[name]} {name}" for name in FAULTS if name != "cut" and kill[name]]
    if kill["whole_cut"]:
        messages.append(f"{kill['whole_cut']} complete responses cut")
    if kill["ready_again"] is None:
        messages.append("the server was not ready again")
    if kill["livez_failed"]:
        messages.append(f"{kill['livez_failed']} probes of /livez failed")
    if kill["misses"]:
        missed = ", ".join(f"{count} of {family}" for family, count in sorted(kill["misses"].items()))
        messages.append(f"the new start had misses: {missed}")
    return messages


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    kill = report["kill"]
    recovery = "never" if kill["ready_again"] is None else f"after {kill['ready_again']:.2f} s"
    first = kill["first_start"]
    return "\n".join(
        [
            f"worker killed after {kill['after']:g} s; ready again {recovery}; first start: {first:.2f} s",
            f"  answers: {statuses(kill)}; {kill['refused']} refused cleanly, {kill['cut']} streams broke off",
            "; ".join(faults(report)) or "no request was lost or failed, and every audio was correct",
        ]
    )
