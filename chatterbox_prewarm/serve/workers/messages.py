"""The protocol between the front process and a worker: messages over a socket pair.

A message is a JSON header and a payload of bytes. Two unsigned 32-bit big-endian lengths precede it on the wire.

The front sends `configure` with the configuration, then `speak`, `convert` with a WAV file, `cancel` and `stop`. A
worker answers `speak` and `convert` with one `audio` message for each chunk. It answers a failed request with `error`
and a cancelled one with `cancelled`. During a request it sends `progress`, so that the front can distinguish a busy
worker from a hung one.

During its start a worker sends `phase`, `attached`, and `ready` or `failed`. It sends `alive` every second from its
first moment on, so that the front notices a stopped process. Before each step of the idle warm-up it sends `warming`
with the name of the step, then `warmed`, or `warming` without a name when the step did not finish.
"""

from __future__ import annotations

import json
import queue
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    import socket

    Message = tuple[dict[str, Any], bytes]

#: Seconds between two `alive` or `progress` messages.
PROGRESS_SECONDS = 1.0

_LENGTHS = struct.Struct("!II")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk of synthesized audio.

    Attributes:
        pcm: mono audio at 24 kHz, 16-bit little-endian samples.
        tokens: number of speech tokens in it.
        seconds: how long the worker needed for the request; None for all chunks but the last.
        truncated: True if the speech ends at the token limit, so that its end may be missing. With `look_ahead`, only
            the last chunk tells.
        skipped: number of parts of the text that were left out directly before this chunk. Only the front sets it. If
            the last part was left out, an empty chunk follows the audio.
    """

    pcm: bytes
    tokens: int
    seconds: float | None = None
    truncated: bool = False
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Resources that a worker process uses.

    Attributes:
        rss_bytes: resident memory of the process.
        vram_bytes: GPU memory that PyTorch's allocator has reserved.
        vram_peak_bytes: the most GPU memory that was allocated at one time.
        voices, voice_bytes: number and size of the added voices in memory.
        prefixes, prefix_bytes: number and size of the voices' keys and values in memory.
        prefix_hits, prefix_misses, prefix_evictions: how often they were there, were computed, and were removed.
    """

    rss_bytes: int = 0
    vram_bytes: int = 0
    vram_peak_bytes: int = 0
    voices: int = 0
    voice_bytes: int = 0
    prefixes: int = 0
    prefix_bytes: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_evictions: int = 0


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Encode a message for the wire."""
    data = json.dumps(header).encode()
    return _LENGTHS.pack(len(data), len(payload)) + data + payload


async def read(stream: asyncio.StreamReader) -> Message:
    """Read the next message.

    Raises:
        asyncio.IncompleteReadError: the other side has closed the connection.
    """
    header_length, payload_length = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    return json.loads(await stream.readexactly(header_length)), await stream.readexactly(payload_length)


def receive(connection: socket.socket) -> Message | None:
    """Block until the next message arrives; return None when the other side has closed the connection."""
    lengths = _receive_exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header_length, payload_length = _LENGTHS.unpack(lengths)
    data = _receive_exactly(connection, header_length + payload_length)
    return None if data is None else (json.loads(data[:header_length]), data[header_length:])


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        chunk = connection.recv(min(length - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


class PreemptedError(Exception):
    """A request arrived during idle work, so the work stops."""


class RequestQueue:
    """The queue of messages that a worker has received. A thread fills it, so a request can be cancelled while it runs.

    Args:
        connection: the socket to read until the other side closes it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._cancelled = 0  # the latest id is enough: ids rise, and a worker has one request at a time
        threading.Thread(target=self._read, name="request queue", daemon=True).start()

    def get(self, timeout: float | None) -> Message | None:
        """Return the next message, or None once the other side has closed the connection.

        Args:
            timeout: seconds to wait; None waits without a limit.

        Raises:
            queue.Empty: no message arrived in time.
        """
        message = self._messages.get(timeout=timeout)
        if message is None:
            self._messages.put(None)
        return message

    def is_cancelled(self, request_id: int) -> bool:
        """Return whether the front has cancelled this request."""
        return request_id == self._cancelled

    def check_preempted(self) -> None:
        """Stop idle work when a message is waiting.

        Raises:
            PreemptedError: a message is waiting.
        """
        if not self._messages.empty():
            raise PreemptedError

    def _read(self) -> None:
        try:
            while (message := receive(self._connection)) is not None:
                if message[0]["type"] == "cancel":
                    self._cancelled = message[0]["id"]
                else:
                    self._messages.put(message)
        except ConnectionError:
            pass  # the front process ended, which means the same as a closed connection
        finally:
            self._messages.put(None)
