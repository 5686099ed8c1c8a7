"""A request body that is read from a stream while it is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import EngineError, from_os_error

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

#: Bytes that are in memory at once.
_CHUNK = 1 << 20
FILE_CHANGED = "the file changed after it was described: create it again"


@dataclass(kw_only=True, eq=False)
class StreamBody:
    """The next `length` bytes of a stream, as a request body that can be sent once."""

    stream: BinaryIO
    length: int
    subject: str
    counters: Counter[str]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[bytes]:
        remaining = self.length
        while remaining:
            chunk = _read(self.stream, remaining)
            if not chunk:
                raise EngineError(f"{self.subject} is {remaining} bytes shorter than described", next_step=FILE_CHANGED)
            remaining -= len(chunk)
            self.counters["bytes_sent"] += len(chunk)
            yield chunk


def skip(stream: BinaryIO, count: int) -> None:
    """Move a stream forward, also one that cannot seek."""
    if count and stream.seekable():
        stream.seek(count)
        return
    while count:
        chunk = _read(stream, count)
        if not chunk:
            return  # too short: sending the rest reports it
        count -= len(chunk)


def _read(stream: BinaryIO, count: int) -> bytes:
    """Read at most one chunk. An OSError of the file must not look like a broken connection, which is retried."""
    try:
        return stream.read(min(count, _CHUNK))
    except OSError as error:
        raise from_os_error(error, "reading the data to upload") from error
