"""Audio that waits in the front for clients, so that no worker waits for a client.

The audio of a text of the usual length fits into the buffer of its request. A longer text is spoken in parts, and no
part starts while the buffer of the request is full, or while the buffers of all requests together are.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.serve.workers.messages import Chunk

#: Audio of one request that may wait when a part starts: eleven minutes.
_REQUEST_BYTES = 32 << 20
#: Audio of all requests that may wait when a part starts. The server then also refuses new requests.
_ALL_BYTES = 128 << 20


class Backlog:
    """The amount of audio that waits for all clients.

    Attributes:
        size: in bytes.
        changed: set when the amount falls.
    """

    def __init__(self) -> None:
        self.size = 0
        self.changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """True if no more audio should be made until clients have read some."""
        return self.size >= _ALL_BYTES

    def add(self, size: int) -> None:
        """Change the amount by `size` bytes."""
        self.size += size
        if size < 0:
            self.changed.set()

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count `size` bytes within the `with` block."""
        self.add(size)
        try:
            yield
        finally:
            self.add(-size)


class AudioBuffer:
    """A queue with the audio of one request.

    Args:
        backlog: counts the audio in all buffers.
    """

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._size = 0

    def put(self, chunk: Chunk) -> None:
        """Add a chunk. Never waits."""
        self._count(len(chunk.pcm))
        self._chunks.put_nowait(chunk)

    def end(self) -> None:
        """Mark the end: `get` returns None after the last chunk."""
        self._chunks.put_nowait(None)

    async def get(self) -> Chunk | None:
        """Wait for the next chunk and remove it; return None at the end."""
        chunk = await self._chunks.get()
        if chunk is not None:
            self._count(-len(chunk.pcm))
        return chunk

    async def room(self) -> None:
        """Wait until another part of the text may be spoken."""
        while self._size >= _REQUEST_BYTES or (self._size and self._backlog.is_full):
            self._backlog.changed.clear()
            await self._backlog.changed.wait()

    def close(self) -> None:
        """Drop the chunks that were not read."""
        self._count(-self._size)

    def _count(self, size: int) -> None:
        self._size += size
        self._backlog.add(size)
