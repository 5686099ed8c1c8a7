"""A worker that is killed under load: each request gets its sound or a clean refusal, and the server is ready again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import LivezProbe, ask
from chatterbox_prewarm.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.bench.clients import Answer, Target
    from chatterbox_prewarm.bench.server import MeasuredServer

#: Until the server is ready again; more than any start takes.
_PATIENCE = 600.0
#: A client that was refused waits so long. Retry-After says more, for clients that have something else to do.
_PAUSE = 0.25
_POLL = 0.02


def kill_worker(
    server: MeasuredServer,
    target: Target,
    orders: Sequence[dict[str, Any]],
    expected: Mapping[bool, Sequence[str]],
    *,
    clients: int,
    requests: int,
    after: float,
    first_start: float,
) -> dict[str, Any]:
    """Kill one worker of `server` while clients ask, each until it has its sounds and the server is ready again.

    Args:
        server: whose worker.
        target: the same server, by its address.
        orders: what is asked for, in turn; every other request is streamed.
        expected: the digest of each order's sound, streamed and whole.
        clients: how many at a time.
        requests: sounds that each client must have had.
        after: seconds of load before.
        first_start: when the server was ready at first, in seconds since exec.

    Raises:
        ModelError: there was no worker to kill.
    """
    recovery = _Recovery(server, target)
    give_up = time.monotonic() + after + _PATIENCE

    def client(number: int) -> list[tuple[Answer, bool, bool]]:
        seen: list[tuple[Answer, bool, bool]] = []
        spoken = turn = 0
        while (spoken < requests or not recovery.over.is_set()) and time.monotonic() < give_up:
            which, streamed = (number + turn) % len(orders), bool(turn % 2)
            answer = ask(target, orders[which], streamed=streamed)
            seen.append((answer, streamed, answer.digest == expected[streamed][which]))
            turn += 1
            spoken += answer.outcome == "sound"
            if answer.outcome != "sound":
                time.sleep(_PAUSE)
        return seen

    with LivezProbe(target) as probe, ThreadPoolExecutor(clients + 1) as pool:
        watching = pool.submit(recovery.run, after)
        seen = [entry for found in pool.map(client, range(clients)) for entry in found]
        watching.result()
    outcomes = Counter(answer.outcome for answer, _, _ in seen)
    return {
        "clients": clients,
        "after": after,
        "statuses": dict(sorted(Counter(str(answer.status) for answer, _, _ in seen).items())),
        **{name: outcomes[name] for name in ("sound", "refused", "lost", "failed", "cut")},
        "whole_cut": sum(answer.outcome == "cut" and not streamed for answer, streamed, _ in seen),
        "wrong": sum(answer.outcome == "sound" and not right for answer, _, right in seen),
        "texts": sorted({answer.text for answer, _, _ in seen if answer.text})[:10],
        "first_start": first_start,
        "ready_again": recovery.seconds,
        "misses": recovery.misses,
        "livez_most": round(max(probe.seconds, default=0.0), 4),
        "livez_failed": probe.failed,
    }


class _Recovery:
    """Kills a worker and waits until the server has another that is ready.

    Attributes:
        over: set when that is so, or will not be.
        seconds: from the kill to ready; None while that is not so.
        misses: of the new start.
    """

    def __init__(self, server: MeasuredServer, target: Target) -> None:
        self.over = threading.Event()
        self.seconds: float | None = None
        self.misses: dict[str, int] = {}
        self._server = server
        self._target = target

    def run(self, after: float) -> None:
        try:
            time.sleep(after)
            self._run()
        finally:
            self.over.set()

    def _run(self) -> None:
        before = self._target.status()["restarts"]
        workers = self._server.workers()
        if not workers:
            raise ModelError("the server has no worker to kill", next_step="see the end of its log")
        os.kill(workers[0], signal.SIGKILL)
        killed = time.monotonic()
        while time.monotonic() < killed + _PATIENCE and self._server.process.poll() is None:
            status = self._target.status()
            whole = status["ready"] and all(worker["ready"] for worker in status.get("workers", []))
            if status["restarts"] > before and whole:
                self.seconds = round(time.monotonic() - killed, 3)
                self.misses = status.get("misses", {})
                return
            time.sleep(_POLL)
