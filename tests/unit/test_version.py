"""Test that the version names the commit of these sources, and never another one."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm import version
from chatterbox_prewarm.version import COMMIT_FILE, commit, commit_of, describe
from tests.conftest import ROOT, run_cli

if TYPE_CHECKING:
    from pathlib import Path


def _git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the package, which this process takes for its own sources."""
    package = tmp_path / "checkout" / "chatterbox_prewarm"
    package.mkdir(parents=True)
    shutil.copy(version.__file__, package / "version.py")
    _git(package.parent, "init", "--quiet")
    _git(package.parent, "add", ".")
    _git(package.parent, "commit", "--quiet", "--message", "a commit")
    monkeypatch.setattr(version, "__file__", str(package / "version.py"))
    return package.parent


def test_a_checkout_has_its_commit_and_says_if_files_differ_from_it(checkout: Path) -> None:
    head = _git(checkout, "rev-parse", "HEAD")
    assert commit() == head
    (checkout / "new.txt").touch()
    assert commit() == head, "files that git does not know change nothing"
    (checkout / "chatterbox_prewarm" / "version.py").write_text("# changed\n")
    assert commit() == f"{head}+changes"
    assert describe() == f"{version.__version__} (commit {head}+changes)"


def test_a_written_commit_precedes_the_repository(checkout: Path) -> None:
    written = checkout / "chatterbox_prewarm" / COMMIT_FILE
    written.write_text(f"{'a' * 40}\n")
    assert commit() == "a" * 40
    written.write_text("something else\n")
    assert commit() == ""
    assert describe() == version.__version__


def test_the_commit_of_a_repository_above_the_sources_is_not_theirs(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = checkout / "vendor" / "chatterbox_prewarm"
    unpacked.mkdir(parents=True)
    monkeypatch.setattr(version, "__file__", str(unpacked / "version.py"))
    assert commit() == ""


def test_without_git_the_commit_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert commit_of(checkout) == ""


def test_the_command_line_shows_the_version_and_the_commit() -> None:
    shown = run_cli("--version")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == f"chatterbox-prewarm, version {describe()}\n"
    assert not (ROOT / "chatterbox_prewarm" / COMMIT_FILE).exists(), "a checkout has no such file"
