"""What was made of a request's sound and not yet taken, with a bound beyond which no more is made."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from chatterbox_prewarm.serve.workers.messages import Chunk

#: Twenty seconds of sound: enough that none is missed between two parts, little enough for a client that does not read.
_ROOM = 20 * 24_000 * 2


class Backlog:
    """Chunks between who makes them and who takes them."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self._bytes = 0
        #: Whether there ever was a chunk.
        self.given = False
        self._taken = asyncio.Event()

    def put(self, chunk: Chunk) -> None:
        """Add a chunk."""
        self.given = True
        self._bytes += len(chunk.pcm)
        self._items.put_nowait(chunk)

    def end(self) -> None:
        """No more will come, since that was all."""
        self._items.put_nowait(None)

    def fail(self, error: Exception) -> None:
        """No more will come, and why."""
        self._items.put_nowait(error)

    async def room(self) -> None:
        """Wait until so much was taken that more may be made."""
        while self._bytes > _ROOM:
            self._taken.clear()
            await self._taken.wait()

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """Take all chunks.

        Raises:
            Exception: what `fail` was given.
        """
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            self._bytes -= len(item.pcm)
            self._taken.set()
            yield item
