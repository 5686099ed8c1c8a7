"""Build the wheel and the sdist of this checkout, and install a wheel into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

_BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


def checkout_files() -> list[str]:
    """Return the files of this checkout, also those that are not committed yet."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return its output."""
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def copy_checkout(copy: Path) -> Path:
    """Make a repository with a copy of this checkout, so that a build writes nothing here."""
    for name in checkout_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    git(copy, "init", "--quiet")
    git(copy, "add", ".")
    git(copy, "commit", "--quiet", "--message", "a commit")
    return copy


def build_package(kind: str, source: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` as pip does, but with the installed setuptools."""
    command = [sys.executable, "-c", _BUILD.format(kind=kind), str(folder)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.iterdir()
    return path


class Environment:
    """A new virtual environment, filled with uv, which is seven times as fast as pip, or with pip."""

    def __init__(self, interpreter: str, path: Path) -> None:
        self.path = path
        self._uv = shutil.which("uv", path=f"{ROOT}/.venv-unlocked/bin:{os.environ['PATH']}")
        self._run([self._uv, "venv", "--python", interpreter, path] if self._uv else [interpreter, "-m", "venv", path])

    def install(self, *arguments: str) -> None:
        """Run `pip install` with arguments that uv and pip both know."""
        pip: list[str | Path] = [self.path / "bin" / "pip", "install", "--disable-pip-version-check"]
        self._run([*([self._uv, "pip", "install", "--python", self.path] if self._uv else pip), *arguments])

    def _run(self, command: list[str | Path]) -> None:
        environment = {**os.environ, "UV_LINK_MODE": "hardlink"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.path.parent, env=environment
        )
        assert done.returncode == 0, done.stderr
