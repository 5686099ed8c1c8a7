"""gzip in members of a fixed size: compressed on all cores, and the same bytes however many there are.

RFC 1952 lets a file consist of any number of members, one after another; layers of the kind eStargz are such files, and
every engine reads them. Each member begins with an empty window, which costs about a percent.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future

#: Bytes of a member before compression.
MEMBER = 1 << 20
#: Of zlib: a header and a trailer of gzip around the data; the header has no name and no time.
_GZIP = 16 + zlib.MAX_WBITS
#: Each holds members in memory, and hashing keeps up with no more.
_MOST_THREADS = 8


def compressed(pieces: Iterable[bytes], level: int) -> Iterator[bytes]:
    """Compress what comes in pieces of any size; at most some twenty members are in memory.

    Args:
        pieces: of the content.
        level: of zlib, 0 to 9.
    """
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="gzip") as pool:
        for block in _blocks(pieces):
            waiting.append(pool.submit(_member, block, level))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _member(block: bytes, level: int) -> bytes:
    member = zlib.compressobj(level, zlib.DEFLATED, _GZIP)
    return member.compress(block) + member.flush()


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same content in blocks of a member's size, the last of what is left; an empty one of no content at all."""
    rest = bytearray()
    empty = True
    for piece in pieces:
        rest += piece
        while len(rest) >= MEMBER:
            yield bytes(rest[:MEMBER])
            del rest[:MEMBER]
            empty = False
    if rest or empty:
        yield bytes(rest)
