"""Compress with gzip on all cores. The output does not depend on the number of cores.

The content is cut into blocks, and each becomes one gzip member. RFC 1952 allows any number of members in a file, and
every engine reads them. Each member starts with an empty window, which costs about one percent of size.
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
MEMBER_SIZE = 1 << 20
#: zlib's window size, plus 16 for a gzip header and trailer. The header has no name and no time.
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
#: Maximum number of threads. Hashing the output cannot keep up with more, and each thread needs memory for members.
_MAX_THREADS = 8


def gzip_chunks(chunks: Iterable[bytes], level: int) -> Iterator[bytes]:
    """Yield gzip members of content that arrives in chunks of any size. At most about 20 members are in memory.

    Args:
        chunks: the content.
        level: zlib's compression level, 0 to 9.
    """
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="gzip") as pool:
        for block in _blocks(chunks):
            pending.append(pool.submit(_compress, block, level))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _compress(block: bytes, level: int) -> bytes:
    member = zlib.compressobj(level, zlib.DEFLATED, _GZIP_WINDOW)
    return member.compress(block) + member.flush()


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content in blocks of MEMBER_SIZE; the last one is shorter. Empty content is one empty block."""
    buffer = bytearray()
    empty = True
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= MEMBER_SIZE:
            yield bytes(buffer[:MEMBER_SIZE])
            del buffer[:MEMBER_SIZE]
            empty = False
    if buffer or empty:
        yield bytes(buffer)
