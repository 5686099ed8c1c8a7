"""A process that talks to a supervisor like a worker, without a model. Its argument decides how it behaves."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, ModelError, WeightsError
from chatterbox_prewarm.serve.workers import messages
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.system.json_subprocess import describe
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess

CONFIG = WorkerConfig(
    start=StartOptions(warm=Path(), weights=Path(), cache=Path(), policy="require"), max_new_tokens=100
)
#: Errors of a start, and whether the worker calls them transient.
_START_ERRORS = {
    "weights": (WeightsError("the weights are gone", next_step="mount them"), False),
    "memory": (ModelError("out of memory", next_step="give it more"), True),
}

_FOREIGN = BadInputError("the model does not know this text", next_step="send another")


def start(*behaviours: str, configs: list[WorkerConfig] | None = None) -> Callable[[WorkerConfig], WorkerProcess]:
    """Return a function that starts one process for each behaviour, in this order.

    Args:
        *behaviours: "ready" answers requests, and the text decides how: see `_answer`; "slow" answers each after a
            second; "stuck" answers none; "silent" sends nothing at all; "dies" ends before it is ready; "weights" and
            "memory" report an error during the start; "warming" dies in the idle warm-up.
        configs: receives the configuration of each process.
    """
    remaining = list(behaviours)

    def start_one(config: WorkerConfig) -> WorkerProcess:
        if configs is not None:
            configs.append(config)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.helpers.stand_in_worker", str(theirs.fileno()), remaining.pop(0)]
            return subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=ROOT), ours

    return start_one


class StandIn:
    """The worker's side of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._send_lock = threading.Lock()

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        with self._send_lock:
            self._connection.sendall(messages.encode(header, payload))

    def report_alive(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.send({"type": "alive"})
                time.sleep(0.1)

    def start(self, behaviour: str) -> None:
        """Become ready, or fail in the way that `behaviour` names."""
        if behaviour == "silent":
            time.sleep(600)
        threading.Thread(target=self.report_alive, daemon=True).start()
        if behaviour == "dies":
            sys.exit(3)
        if behaviour in _START_ERRORS:
            error, transient = _START_ERRORS[behaviour]
            self.send({"type": "failed", "transient": transient, **describe(error)})
            sys.exit(error.exit_code)
        self.send({"type": "attached", "voices": {"default": 1}})
        self.send({"type": "ready"})
        if behaviour == "warming":
            self.send({"type": "warming", "step": "100 speech tokens"})
            sys.exit(15)

    def serve(self, behaviour: str) -> None:
        """Receive requests until the connection is closed, and answer them unless `behaviour` is "stuck"."""
        while (message := messages.receive(self._connection)) is not None and message[0]["type"] != "stop":
            if behaviour == "slow":
                time.sleep(1)
            if behaviour in {"ready", "slow"}:
                self._answer(*message)

    def _answer(self, header: dict[str, Any], payload: bytes) -> None:
        """Send the text as its audio, or speech as it is.

        The text can contain the words "loud" (megabytes of audio), "endless" (the token limit is reached), "foreign"
        (the text is refused) and "unanswered".
        """
        if header["type"] == "speak":
            text = header["options"]["text"]
            if "unanswered" in text:
                return
            if "foreign" in text:
                self.send({"type": "error", "id": header["id"], "fatal": False, **describe(_FOREIGN)})
                return
            answer = {"type": "audio", "id": header["id"], "tokens": 1, "last": True, "seconds": 0.1}
            audio = text.encode() * ((1 << 22) if "loud" in text else 1)
            self.send({**answer, "truncated": "endless" in text}, audio)
        else:
            answer = {"type": "audio", "id": header["id"], "tokens": 1, "last": True, "seconds": 0.1}
            self.send({**answer, "truncated": False}, payload)


def main(behaviour: str, connection: socket.socket) -> None:
    worker = StandIn(connection)
    worker.start(behaviour)
    worker.serve(behaviour)


if __name__ == "__main__":
    main(sys.argv[2], socket.socket(fileno=int(sys.argv[1])))
