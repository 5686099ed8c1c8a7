"""Messages between front and worker over a socket pair: a JSON header and a payload of bytes.

On the wire: two unsigned 32-bit big-endian lengths, then the header, then the payload.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio
    import socket

_LENGTHS = struct.Struct("!II")


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """One message as bytes."""
    data = json.dumps(header).encode()
    return _LENGTHS.pack(len(data), len(payload)) + data + payload


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Read one message, blocking; None when the other side has closed."""
    lengths = _receive_exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header_length, payload_length = _LENGTHS.unpack(lengths)
    data = _receive_exactly(connection, header_length + payload_length)
    if data is None:
        return None
    header: dict[str, Any] = json.loads(data[:header_length])
    return header, data[header_length:]


def _receive_exactly(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        chunk = connection.recv(min(length - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


async def read(stream: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """Read one message.

    Raises:
        asyncio.IncompleteReadError: the other side has closed.
    """
    header_length, payload_length = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    header: dict[str, Any] = json.loads(await stream.readexactly(header_length))
    return header, await stream.readexactly(payload_length)
