"""A readable stream over byte strings that are generated while it is read."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Generator

    from typing_extensions import Buffer

_BUFFER = 1 << 20


class _RawStream(io.RawIOBase):
    def __init__(self, chunks: Generator[bytes]) -> None:
        self._chunks = chunks
        self._unread = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._unread:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._unread = memoryview(chunk)
        count = min(len(view), len(self._unread))
        view[:count], self._unread = self._unread[:count], self._unread[count:]
        return count

    def close(self) -> None:
        self._chunks.close()
        super().close()


def chunk_stream(chunks: Generator[bytes]) -> BinaryIO:
    """Return a buffered stream of the bytes that a generator yields. Closing the stream closes the generator."""
    return cast("BinaryIO", io.BufferedReader(_RawStream(chunks), _BUFFER))
