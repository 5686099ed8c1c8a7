"""How a folder is written: by one process at a time, nothing left of a killed one, and in place all at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.atomic_files import put_in_place, seal, staging_folder
from chatterbox_prewarm.system.locks import exclusive_lock, share_lock
from chatterbox_prewarm.system.process import PARENT
from tests.helpers.children import start

if TYPE_CHECKING:
    from pathlib import Path
    from subprocess import Popen


def wait_for(path: Path, process: Popen[str]) -> None:
    """Wait until another process has made a file."""
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, "the process ended too early"
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


def test_a_second_process_in_the_same_place_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with start("hold_staging", {"warm": str(warm)}) as other:
        try:
            wait_for(tmp_path / "busy", other)
            with (
                pytest.raises(BadInputError, match=rf"another process \({other.pid}\) is writing") as caught,
                exclusive_lock(warm),
            ):
                pass
            assert caught.value.exit_code == 16
            with exclusive_lock(tmp_path / "elsewhere"):
                pass
        finally:
            other.kill()


def test_a_place_that_others_share_is_nobodys_alone(tmp_path: Path) -> None:
    place = tmp_path / "bake"
    with start("share_place", {"place": str(place)}) as one:
        try:
            wait_for(tmp_path / "busy", one)
            (tmp_path / "busy").unlink()
            with start("share_place", {"place": str(place)}) as two:
                try:
                    wait_for(tmp_path / "busy", two)
                finally:
                    two.kill()
            with pytest.raises(BadInputError, match=f"another process uses {tmp_path}"), exclusive_lock(place):
                pass
        finally:
            one.kill()
            one.wait()
    with exclusive_lock(place):
        pass


def test_a_place_that_somebody_holds_is_not_shared_but_by_those_whom_the_holder_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "warm"
    with start("hold_staging", {"warm": str(place)}) as holder:
        try:
            wait_for(tmp_path / "busy", holder)
            with pytest.raises(BadInputError, match=rf"another process \({holder.pid}\) is writing"):
                share_lock(place)
            monkeypatch.setenv(PARENT, str(holder.pid))
            share_lock(place)
        finally:
            holder.kill()
            holder.wait()
    with exclusive_lock(place):
        pass


def test_what_a_killed_bake_left_is_removed_by_the_next(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with start("hold_staging", {"warm": str(warm)}) as other:
        try:
            wait_for(tmp_path / "busy", other)
        finally:
            other.kill()
    (leftover,) = tmp_path.glob(".warm.staging-*")
    assert (leftover / "family" / "half").read_text() == "half of it"
    with exclusive_lock(warm), staging_folder(warm) as staging:
        assert not leftover.exists()
        assert list(tmp_path.glob(".warm.staging-*")) == [staging]
    assert not warm.exists()
    assert list(tmp_path.glob(".warm.staging-*")) == []


def test_the_staging_of_another_target_is_left_alone(tmp_path: Path) -> None:
    with staging_folder(tmp_path / "warm") as one, staging_folder(tmp_path / "warm2") as two:
        assert one.is_dir()
        assert two.is_dir()


def test_the_lock_is_free_again_after_a_bake_that_failed(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    with pytest.raises(FileExistsError), exclusive_lock(warm), staging_folder(warm) as staging:
        staging.mkdir()
    assert not staging.exists()
    with exclusive_lock(warm):
        pass


def test_a_first_state_gets_its_name(tmp_path: Path) -> None:
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
        assert (staging / "numba" / "old").read_text() == "old"  # exchanged in one step, not deleted before
    assert [path.name for path in warm.iterdir()] == ["manifest.json"]
    assert list(tmp_path.glob(".warm.*")) == []


def test_a_sealed_state_can_be_written_by_nobody(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "numba" / "deep").mkdir(parents=True)
    (state / "numba" / "deep" / "file").write_text("x")
    seal(state)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [state, *state.rglob("*")]}
    assert modes == {"state": 0o555, "numba": 0o555, "deep": 0o555, "file": 0o444}
