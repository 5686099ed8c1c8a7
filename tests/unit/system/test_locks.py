"""Test that one process at a time writes a path, and that a shared path cannot be written."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.atomic_files import atomic_file, scratch_folder, staging_folder
from chatterbox_prewarm.system.children import PARENT
from chatterbox_prewarm.system.locks import exclusive_lock, share_lock
from tests.helpers.children import start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from subprocess import Popen


@contextmanager
def running(program: str, path: Path) -> Iterator[Popen[str]]:
    """Run a program of `tests.helpers.children` until the block ends, and wait until it has its lock."""
    ready = path.with_name("locked")
    ready.unlink(missing_ok=True)
    with start(program, {"path": str(path)}) as process:
        try:
            for _ in range(600):
                if ready.exists():
                    break
                assert process.poll() is None, "the process ended too early"
                time.sleep(0.05)
            else:
                raise AssertionError(f"{ready} never appeared")
            yield process
        finally:
            process.kill()
            process.wait()


def test_a_locked_path_is_refused_with_the_process_that_holds_it(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with running("hold_lock", warm) as holder:
        with (
            pytest.raises(BadInputError, match=rf"another process \({holder.pid}\) is writing") as caught,
            exclusive_lock(warm),
        ):
            pass
        assert caught.value.exit_code == 16
        with exclusive_lock(tmp_path / "elsewhere"):
            pass


def test_several_processes_can_share_a_path_and_none_of_them_excludes_the_others(tmp_path: Path) -> None:
    path = tmp_path / "bake"
    with running("share_lock", path):
        with running("share_lock", path):
            pass
        with pytest.raises(BadInputError, match=f"another process uses {tmp_path}"), exclusive_lock(path):
            pass
    with exclusive_lock(path):
        pass


def test_only_children_of_the_holder_can_use_a_locked_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "warm"
    with running("hold_lock", path) as holder:
        with pytest.raises(BadInputError, match=rf"another process \({holder.pid}\) is writing"):
            share_lock(path)
        monkeypatch.setenv(PARENT, str(holder.pid))
        share_lock(path)
    with exclusive_lock(path):
        pass


def test_the_next_bake_removes_the_staging_folder_of_a_killed_one(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with running("hold_lock", warm):
        pass
    (leftover,) = tmp_path.glob(".warm.staging-*")
    assert (leftover / "family" / "file").read_text() == "incomplete"
    with exclusive_lock(warm), staging_folder(warm) as staging:
        assert not leftover.exists()
        assert list(tmp_path.glob(".warm.staging-*")) == [staging]
    assert not warm.exists()
    assert list(tmp_path.glob(".warm.staging-*")) == []


def test_the_lock_is_free_after_a_bake_that_failed(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with pytest.raises(FileExistsError), exclusive_lock(warm), staging_folder(warm) as staging:
        staging.mkdir()
    assert not staging.exists()
    with exclusive_lock(warm):
        pass


def make_link(lock: Path, victim: Path) -> None:
    lock.symlink_to(victim)


def make_hard_link(lock: Path, victim: Path) -> None:
    lock.hardlink_to(victim)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "make", [make_link, make_hard_link, lambda lock, _: os.mkfifo(lock), lambda lock, _: lock.mkdir()]
)
def test_a_lock_file_that_leads_to_another_file_is_refused_and_nothing_is_overwritten(
    tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    victim, lock = tmp_path / "victim", tmp_path / ".bake.lock"
    victim.write_text("precious")
    make(lock, victim)
    with (
        pytest.raises(BadInputError, match=r"\.bake\.lock is not a lock file") as caught,
        exclusive_lock(tmp_path / "bake"),
    ):
        pass
    assert "remove it" in caught.value.next_step
    with pytest.raises(BadInputError, match=r"\.bake\.lock is not a lock file"):
        share_lock(tmp_path / "bake")
    assert victim.read_text() == "precious"


def test_a_link_without_target_does_not_create_a_file(tmp_path: Path) -> None:
    (tmp_path / ".bake.lock").symlink_to(tmp_path / "new")
    with pytest.raises(BadInputError, match="is not a lock file"), exclusive_lock(tmp_path / "bake"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_scratch_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "layers-link").symlink_to(tmp_path / "other")
    (tmp_path / "layers-file").touch()
    with running("hold_scratch_folder", tmp_path / "path"):
        (held,) = (path for path in tmp_path.glob("layers-*") if (path / "0.tar.gz").exists())
        with scratch_folder("layers-") as folder, scratch_folder("layers-") as second:
            assert held.is_dir()
            assert folder.is_dir()
            assert second != folder
        assert not folder.exists()
    assert held.is_dir(), "the process was killed"
    with scratch_folder("layers-"):
        assert not held.exists()
    assert {path.name for path in tmp_path.glob("*")} == {"other", "layers-link", "layers-file", "locked"}


def test_a_temporary_file_of_a_killed_process_is_removed_and_that_of_a_running_one_stays(tmp_path: Path) -> None:
    (tmp_path / ".config.12345678").touch()
    (tmp_path / ".blob-1.notes").touch()
    with running("hold_temporary_file", tmp_path / "blob-1"):
        (held,) = (path for path in tmp_path.glob(".blob-1.*") if path.suffix != ".notes")
        with atomic_file(tmp_path / "blob-2", leftovers="blob-[0-9]") as temporary:
            temporary.write_text("complete")
        assert held.exists()
    assert held.exists(), "the process was killed"
    with atomic_file(tmp_path / "blob-3", leftovers="blob-[0-9]") as temporary:
        temporary.write_text("complete")
        assert not held.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".config.12345678", ".blob-1.notes", "blob-2", "blob-3", "locked"}
