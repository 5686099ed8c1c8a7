"""A worker's incoming messages, taken in by a thread: a request can be called off while it is being spoken."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.workers import frames

if TYPE_CHECKING:
    import socket

    Message = tuple[dict[str, Any], bytes]


class LeftError(Exception):
    """Work was left since there is other work."""


class Inbox:
    """Reads messages from a connection until the other side closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._cancelled = 0  # the last one; numbers rise, and a worker has one request at a time
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, seconds: float | None) -> Message | None:
        """The next message; None when the other side has closed, and from then on.

        Args:
            seconds: how long to wait; None waits for ever.

        Raises:
            queue.Empty: none came.
        """
        message = self._messages.get(timeout=seconds)
        if message is None:
            self._messages.put(None)
        return message

    def cancelled(self, number: int) -> bool:
        """Whether the front has called this request off."""
        return number == self._cancelled

    def leave_for_others(self) -> None:
        """Called within work that nobody waits for.

        Raises:
            LeftError: there is a message.
        """
        if not self._messages.empty():
            raise LeftError

    def _read(self) -> None:
        try:
            while (message := frames.receive(self._connection)) is not None:
                if message[0]["type"] == "cancel":
                    self._cancelled = message[0]["id"]
                else:
                    self._messages.put(message)
        except ConnectionError:
            pass  # the front is gone, as if it had closed
        finally:
            self._messages.put(None)
