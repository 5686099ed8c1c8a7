"""Test that only regular files are opened, and that opening never blocks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from chatterbox_prewarm.system.regular_files import NotRegularError, read_regular


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular(tmp_path / "file") == b"content"


def test_a_link_is_followed_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(NotRegularError, match="it is a link and not a regular file"):
        read_regular(tmp_path / "link")
    assert read_regular(tmp_path / "link", follow_links=True) == b"content"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("follow_links", [False, True])
def test_everything_else_is_refused_with_its_kind_and_its_path(tmp_path: Path, *, follow_links: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, kind in {"pipe": "a pipe", "directory": "a directory", "socket": "a socket"}.items():
            with pytest.raises(NotRegularError, match=f"it is {kind} and not a regular file") as caught:
                read_regular(tmp_path / name, follow_links=follow_links)
            assert caught.value.filename == str(tmp_path / name)


def test_a_missing_file_and_a_loop_of_links_keep_their_own_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "missing")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links") as caught:
        read_regular(tmp_path / "loop", follow_links=True)
    assert not isinstance(caught.value, NotRegularError)


def test_refused_paths_leave_no_descriptor_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        with pytest.raises(NotRegularError):
            read_regular(tmp_path / "pipe")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
