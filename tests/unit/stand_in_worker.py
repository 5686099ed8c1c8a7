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

from chatterbox_prewarm.child import describe
from chatterbox_prewarm.errors import ModelError, WeightsError
from chatterbox_prewarm.serve import frames
from chatterbox_prewarm.serve.worker import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.serve.supervisor import Spawned

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
            their start; "warming" dies in the idle warm-up, once it was ready; "stuck" answers no request.
        seen: is added to.
    """
    waiting = list(parts)

    def start_one(config: WorkerConfig) -> Spawned:
        if seen is not None:
            seen.append(config)
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.unit.stand_in_worker", str(theirs.fileno()), waiting.pop(0)]
            return subprocess.Popen(command, pass_fds=[theirs.fileno()]), ours

    return start_one


def main(part: str, connection: socket.socket) -> None:
    sending = threading.Lock()

    def send(header: dict[str, Any], payload: bytes = b"") -> None:
        with sending:
            connection.sendall(frames.encode(header, payload))

    def report() -> None:
        with contextlib.suppress(OSError):
            while True:
                send({"type": "alive"})
                time.sleep(0.1)

    if part == "silent":
        time.sleep(600)
    threading.Thread(target=report, daemon=True).start()
    if part == "dies":
        sys.exit(3)
    if part in _FAULTS:
        error, passing = _FAULTS[part]
        send({"type": "failed", "passing": passing, **describe(error)})
        sys.exit(error.exit_code)
    send({"type": "attached", "voices": {"default": 1}})
    send({"type": "ready"})
    if part == "warming":
        send({"type": "warming", "step": "100 speech tokens"})
        sys.exit(15)
    while (message := frames.receive(connection)) is not None and message[0]["type"] != "stop":
        if part == "ready" and message[0]["type"] == "speak":
            header = {"type": "audio", "id": message[0]["id"], "tokens": 1, "last": True, "seconds": 0.1}
            send(header, message[0]["part"]["text"].encode())


if __name__ == "__main__":
    main(sys.argv[2], socket.socket(fileno=int(sys.argv[1])))
