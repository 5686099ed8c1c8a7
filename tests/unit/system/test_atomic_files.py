"""Test that files and folders appear at their path completely or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from chatterbox_prewarm.system.atomic_files import atomic_file, put_in_place, seal, staging_folder, write_whole
from tests.conftest import ROOT

# ---- files


def test_a_file_appears_only_when_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as temporary:
        assert temporary.parent == tmp_path  # a rename works only within a file system
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path, written: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as temporary:
            if written:
                temporary.write_text("incomplete")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("durable", [False, True])
def test_the_mode_of_a_file_is_set_before_it_appears(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    write_whole(path, "Grüße\n", mode=0o440, durable=durable)
    assert path.stat().st_mode & 0o777 == 0o440
    assert path.read_bytes() == "Grüße\n".encode()
    write_whole(path, "new", mode=0o604, durable=durable)  # a read-only file is replaced too
    assert (path.stat().st_mode & 0o777, path.read_text()) == (0o604, "new")


def test_without_a_mode_a_file_keeps_the_permissions_of_the_block(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("text")
        temporary.chmod(0o640)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "other", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o640


# ---- folders


def test_the_staging_folder_of_another_target_is_kept(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "warm") as one, staging_folder(tmp_path / "warm2") as two:
        assert one.is_dir()
        assert two.is_dir()


def test_the_old_state_is_restored_if_a_process_was_killed_before_the_new_one_had_its_name(tmp_path: Path) -> None:
    warm, old = tmp_path / "warm", tmp_path / ".warm.staging-old-7"
    old.mkdir()
    (old / "manifest.json").write_text("old")
    with staging_folder(warm):
        assert (warm / "manifest.json").read_text() == "old"
    assert list(tmp_path.glob(".warm.*")) == []


def test_a_first_state_is_renamed_to_its_target(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with staging_folder(warm) as staging:
        (staging / "manifest.json").write_text("new")
        put_in_place(staging, warm)
    assert (warm / "manifest.json").read_text() == "new"
    assert list(tmp_path.glob(".warm.*")) == []


def test_an_older_state_is_exchanged_for_the_new_one_and_removed(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    (warm / "numba").mkdir(parents=True)
    (warm / "numba" / "old").write_text("old")
    seal(warm)
    with staging_folder(warm) as staging:
        (staging / "manifest.json").write_text("new")
        seal(staging)
        put_in_place(staging, warm)
        assert (staging / "numba" / "old").read_text() == "old"  # both were renamed in one step
    assert [path.name for path in warm.iterdir()] == ["manifest.json"]
    assert list(tmp_path.glob(".warm.*")) == []


_MOVES = """
import os, sys
from pathlib import Path
from chatterbox_prewarm.system.atomic_files import put_in_place, seal
if os.geteuid() == 0:  # root may move everything
    os.setuid(12345)
folder, kept = Path(sys.argv[1]), Path(sys.argv[1]) / "kept" / "state"
for text in ("old", "new"):
    staged = folder / "staging" / "state"
    staged.mkdir(parents=True)
    (staged / "file").write_text(text)
    seal(staged)
    kept.parent.mkdir(exist_ok=True)
    put_in_place(staged, kept)
    print((kept / "file").read_text(), oct(kept.stat().st_mode & 0o777), staged.exists())
    if staged.exists():
        print((staged / "file").read_text())
"""


def test_a_user_without_privileges_moves_a_sealed_state_to_another_folder() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's folder is closed to other users
        Path(folder).chmod(0o777)
        command = [sys.executable, "-c", _MOVES, folder]
        moved = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert moved.stdout.split("\n") == ["old 0o555 False", "new 0o555 True", "old", ""], moved.stderr


def test_a_sealed_state_is_read_only(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "numba" / "deep").mkdir(parents=True)
    (state / "numba" / "deep" / "file").write_text("x")
    seal(state)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [state, *state.rglob("*")]}
    assert modes == {"state": 0o555, "numba": 0o555, "deep": 0o555, "file": 0o444}
