"""Parallel gzip compression."""

from __future__ import annotations

import gzip
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.image.parallel_gzip import MEMBER_SIZE, gzip_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

NOISE = os.urandom(100_000)


@pytest.mark.parametrize("size", [0, 1, MEMBER_SIZE - 1, MEMBER_SIZE, MEMBER_SIZE + 1, 40 * MEMBER_SIZE + 17])
def test_other_gzip_implementations_read_the_output(size: int) -> None:
    content = (NOISE * (size // len(NOISE) + 1))[:size]
    packed = b"".join(gzip_chunks([content], 6))
    assert gzip.decompress(packed) == content
    assert subprocess.run(["gzip", "-dc"], input=packed, capture_output=True, check=True).stdout == content


def test_the_output_depends_on_neither_the_chunks_nor_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    content = NOISE * 73
    outputs = set()
    for cores, chunk in ((1, len(content)), (3, 1000), (64, MEMBER_SIZE), (None, 77_777)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        chunks = [content[start : start + chunk] for start in range(0, len(content), chunk)]
        outputs.add(b"".join(gzip_chunks(chunks, 6)))
    assert len(outputs) == 1
    assert outputs.pop()[3:10] == b"\0\0\0\0\0\0\3", "the header has no name and no time"


def test_an_error_while_reading_the_content_is_raised() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"start"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(gzip_chunks(chunks(), 6))
