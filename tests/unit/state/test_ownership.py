"""Test that a state is used only if no other user can change it, and that one command mends all of its paths."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.state.ownership import refuse_changeable, trusted_owners
from chatterbox_prewarm.state.selection import Request, select_state
from chatterbox_prewarm.state.state import State
from tests.helpers.states import FITTING, make_state

if TYPE_CHECKING:
    from pathlib import Path

OTHER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """Write a state with one family."""
    files = {f"librosa/deep/{name}.nbc": b"machine code" for name in "abcdef"}
    make_state(tmp_path / "warm", {"numba": files})
    return tmp_path / "warm"


def run_advice(error: IntegrityError) -> None:
    """Run the command in the next step of an error."""
    command = re.search("`(.*?)`", error.next_step)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True)


@needs_root
@pytest.mark.parametrize(
    "name", [".", "numba", "numba/librosa", "numba/librosa/deep", "numba/librosa/deep/c.nbc", "manifest.json"]
)
def test_a_path_that_belongs_to_another_user_is_refused(warm: Path, name: str) -> None:
    os.chown(warm / name, OTHER, 0)
    with pytest.raises(IntegrityError, match=rf"belongs to another user \(user id {OTHER}\)") as caught:
        State.open(warm)
    assert str(warm / name) in caught.value.message
    assert "user of this process (0)" in caught.value.message
    run_advice(caught.value)
    State.open(warm)


@needs_root
def test_a_folder_of_states_that_belongs_to_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    folder.mkdir(mode=0o755)
    for name in ("one", "two"):
        make_state(folder / name, {"numba": {"a.nbc": name.encode()}})
    select_state(folder, lambda _: FITTING, Request())
    os.chown(folder, OTHER, 0)
    with pytest.raises(IntegrityError, match="belongs to another user"):
        select_state(folder, lambda _: FITTING, Request())


def check_as(warm: Path, user: int = 0, *namespace: str) -> str:
    """Check the paths of a state in another process, and return its output.

    Args:
        warm: the state.
        user: the user of the process.
        namespace: a command that starts the process in a user namespace.
    """
    code = (
        "import os; from pathlib import Path; from chatterbox_prewarm.state.ownership import refuse_changeable\n"
        f"if {user}: os.setresuid({user}, {user}, {user})\n"
        "try: refuse_changeable(Path('.'), [Path('.'), *Path('.').rglob('*')])\n"
        "except Exception as error: print(error)\n"
        "else: print('used')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*namespace, sys.executable, "-c", code]
    return subprocess.run(command, cwd=warm, env=environment, capture_output=True, text=True, check=False).stdout


def give(warm: Path, user: int) -> None:
    """Give a state to a user."""
    for path in (warm, *warm.rglob("*")):
        os.chown(path, user, 0)


@needs_root
def test_a_user_can_use_a_state_of_root_and_an_own_one_but_no_other_one(warm: Path) -> None:
    assert check_as(warm, 12345) == "used\n"
    give(warm, 12345)
    assert check_as(warm, 12345) == "used\n"
    assert "11 paths of . (., " in (message := check_as(warm, OTHER))
    assert "belong to another user (user id 12345), who can change" in message


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--user", "true"], check=False, stderr=-3).returncode != 0,
    reason="needs root, and a kernel that lets it make user namespaces",
)


@needs_namespaces
def test_a_state_of_root_is_used_in_a_user_namespace_without_root(warm: Path) -> None:
    assert check_as(warm, 0, "unshare", "--user") == "used\n"


@needs_namespaces
def test_a_state_of_an_unknown_user_is_refused_in_a_user_namespace_with_root(warm: Path) -> None:
    root = ("unshare", "--user", "--map-root-user")
    assert check_as(warm, 0, *root) == "used\n"
    give(warm, OTHER)
    assert "belong to another user (user id 65534)" in check_as(warm, 0, *root)


def test_the_overflow_id_counts_as_root_only_if_root_has_no_id(tmp_path: Path) -> None:
    uid_map = tmp_path / "uid_map"
    known = {0, os.geteuid()}
    for text, owners in {
        "         0          0 4294967295\n": known,
        "0 100000 65536\n": known,
        "1000 1000 1\n": known | {65534},
        "1000 1000 1\n0 5000 1\n": known,
        "": known | {65534},
        "damaged\n": known,
    }.items():
        uid_map.write_text(text)
        assert trusted_owners(uid_map) == owners
    assert trusted_owners(tmp_path / "missing") == known


def test_many_writable_paths_are_refused_once_and_one_command_mends_them(warm: Path) -> None:
    for path in (warm, *warm.rglob("*")):
        path.chmod(0o775)
    with pytest.raises(IntegrityError) as caught:
        State.open(warm)
    assert caught.value.message.startswith(f"11 paths of {warm} (., numba, numba/librosa, …) can be written by other")
    run_advice(caught.value)
    State.open(warm)


def test_two_writable_paths_are_both_named(tmp_path: Path) -> None:
    for name in ("a", "b c"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o666)
    with pytest.raises(IntegrityError, match=r"2 paths of .* \(a, b c\) can be written by other users"):
        refuse_changeable(tmp_path, [tmp_path, tmp_path / "a", tmp_path / "b c"])
