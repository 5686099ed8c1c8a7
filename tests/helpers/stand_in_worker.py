"""A process that talks to a supervisor as a worker does, without a model: it does what its argument says.

`start` gives the configurations' processes their parts in turn.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, WeightsError
from chatterbox_prewarm.serve.workers import frames
from chatterbox_prewarm.serve.workers.worker import WorkerConfig
from chatterbox_prewarm.system.json_subprocess import describe
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.serve.workers.spawn import Spawned

CONFIG = WorkerConfig(
    warm="",
    weights="",
    cache="",
    policy="require",
    profile=None,
    key=None,
    signature=None,
    expect_digest=None,
    device="cpu",
    voices={},
    threads=None,
    max_new_tokens=100,
)
_FAULTS = {
    "weights": (WeightsError("the weights are gone", next_step="mount them"), False),
    "memory": (ModelError("out of memory", next_step="give it more"), True),
}


def start(*parts: str, seen: list[WorkerConfig] | None = None) -> Callable[[WorkerConfig], Spawned]:
    """A function that starts a process for each part in turn; `seen` gets what each was started with.

    Args:
        *parts: "ready" serves; "silent" says nothing; "dies" ends before it was ready; "weights" and "memory" fail
            their start; "warming" dies in the idle warm-up, once it was ready; "stuck" answers no request;
            "slow" serves after a second.
        seen: is added to.
    """
    waiting = list(parts)

    def start_one(config: WorkerConfig) -> Spawned:
        if seen is not None:
            seen.append(config)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.helpers.stand_in_worker", str(theirs.fileno()), waiting.pop(0)]
            return subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT), ours

    return start_one


class StandIn:
    """This side of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        with self._sending:
            self._connection.sendall(frames.encode(header, payload))

    def report(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.send({"type": "alive"})
                time.sleep(0.1)

    def begin(self, part: str) -> None:
        """Become ready, or not."""
        if part == "silent":
            time.sleep(600)
        threading.Thread(target=self.report, daemon=True).start()
        if part == "dies":
            sys.exit(3)
        if part in _FAULTS:
            error, passing = _FAULTS[part]
            self.send({"type": "failed", "passing": passing, **describe(error)})
            sys.exit(error.exit_code)
        self.send({"type": "attached", "voices": {"default": 1}})
        self.send({"type": "ready"})
        if part == "warming":
            self.send({"type": "warming", "step": "100 speech tokens"})
            sys.exit(15)

    def serve(self, part: str) -> None:
        """Take requests, and answer them or not."""
        while (message := frames.receive(self._connection)) is not None and message[0]["type"] != "stop":
            if part == "slow":
                time.sleep(1)
            if part in {"ready", "slow"}:
                self._answer(message[0])

    def _answer(self, header: dict[str, Any]) -> None:
        if header["type"] == "speak":
            last = {"type": "audio", "id": header["id"], "tokens": 1, "last": True, "seconds": 0.1}
            self.send(last, header["part"]["text"].encode())
        if header["type"] == "voice":
            from tests.helpers.added_voices import voice

            self.send({"type": "voice", "id": header["id"]}, voice())


def main(part: str, connection: socket.socket) -> None:
    worker = StandIn(connection)
    worker.begin(part)
    worker.serve(part)


if __name__ == "__main__":
    main(sys.argv[2], socket.socket(fileno=int(sys.argv[1])))
