"""gzip in members."""

from __future__ import annotations

import gzip
import os
import subprocess

import pytest

from chatterbox_prewarm.image.parallel_gzip import MEMBER, compressed

NOISE = os.urandom(100_000)


@pytest.mark.parametrize("size", [0, 1, MEMBER - 1, MEMBER, MEMBER + 1, 40 * MEMBER + 17])
def test_any_gzip_reads_what_was_compressed_in_members(size: int) -> None:
    content = (NOISE * (size // len(NOISE) + 1))[:size]
    packed = b"".join(compressed([content], 6))
    assert gzip.decompress(packed) == content
    assert subprocess.run(["gzip", "-dc"], input=packed, capture_output=True, check=True).stdout == content


def test_the_bytes_depend_on_neither_the_pieces_nor_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    content = NOISE * 73
    found = set()
    for cores, piece in ((1, len(content)), (3, 1000), (64, MEMBER), (None, 77_777)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        pieces = [content[start : start + piece] for start in range(0, len(content), piece)]
        found.add(b"".join(compressed(pieces, 6)))
    assert len(found) == 1
    assert found.pop()[3:10] == b"\0\0\0\0\0\0\3", "no name, no time"


def test_an_error_of_the_content_comes_through() -> None:
    def pieces() -> list[bytes]:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(compressed((piece for piece in pieces()), 6))
