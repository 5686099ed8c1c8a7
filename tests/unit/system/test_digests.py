"""Test the digests of files and of sets of files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.system.digests import FileEntry, scan, set_digest, verify_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_the_set_digest_is_over_sorted_lines_and_does_not_depend_on_the_order() -> None:
    one = FileEntry(path="a/1", size=3, sha256="3" * 64)
    two = FileEntry(path="b/2", size=1, sha256="4" * 64)
    lines = f"{'3' * 64}  a/1\n{'4' * 64}  b/2\n"
    assert set_digest([two, one]) == hashlib.sha256(lines.encode()).hexdigest()
    assert set_digest([replace(one, path="b/1"), two]) != set_digest([one, two])


def test_a_scan_lists_files_in_order_and_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    assert scan(tmp_path) == (FileEntry(path="a", size=3, sha256=one), FileEntry(path="b/2", size=3, sha256=two))
    (tmp_path / "c").symlink_to("a")
    with pytest.raises(IntegrityError, match="is a link or a special file"):
        scan(tmp_path)


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"machine c0de"), "sha256"),
        (lambda path: path.write_bytes(b"machine"), "12 bytes expected, 7 found"),
        (lambda path: path.unlink(), "No such file"),
        (replace_by_pipe, "it is a pipe and not a regular file"),
        (lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved")), "it is a link and not a"),
    ],
)
@pytest.mark.timeout(20)
def test_only_the_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "index").write_bytes(b"index")
    (tmp_path / "numba" / "code").write_bytes(b"machine code")
    files = scan(tmp_path)
    assert verify_files(files, tmp_path) == []
    damage(tmp_path / "numba" / "code")
    (problem,) = verify_files(files, tmp_path)
    assert problem.startswith("numba/code: ")
    assert message in problem


def test_files_of_a_checkpoint_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"tensors")  # as in the cache of a hub client
    files = scan(tmp_path)
    (tmp_path / "blob").rename(tmp_path / "moved")
    (tmp_path / "blob").symlink_to("moved")
    assert verify_files(files, tmp_path, follow_links=True) == []
    assert len(verify_files(files, tmp_path)) == 1
