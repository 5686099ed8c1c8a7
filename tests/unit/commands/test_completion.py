"""Test that Tab completes commands, options and values in bash, zsh and fish."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = "chatterbox-prewarm"
#: The input of a user, and the line after completion.
CASES = [
    ("chatterbox-prewarm wei", "chatterbox-prewarm weights"),
    ("chatterbox-prewarm weights synth", "chatterbox-prewarm weights synthesize"),
    ("chatterbox-prewarm bake --prof", "chatterbox-prewarm bake --profile"),
    ("chatterbox-prewarm bake --profile eag", "chatterbox-prewarm bake --profile eager"),
]
#: How the documentation says to switch completion on.
SOURCES = {
    "bash": 'eval "$(_CHATTERBOX_PREWARM_COMPLETE=bash_source chatterbox-prewarm)"',
    "zsh": 'eval "$(_CHATTERBOX_PREWARM_COMPLETE=zsh_source chatterbox-prewarm)"',
    "fish": "_CHATTERBOX_PREWARM_COMPLETE=fish_source chatterbox-prewarm | source",
}
_SECONDS = 60


def _require(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"this machine has no {shell}")
    return found


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with the program on the path, as pip installs it."""
    program = tmp_path / "bin" / PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom chatterbox_prewarm.__main__ import main\nmain()\n")
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "TERM": "dumb",
    }


@contextlib.contextmanager
def _shell(command: list[str], environment: dict[str, str]) -> Iterator[int]:
    """Run an interactive shell, and yield its terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environment)
    try:
        yield terminal
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def _read_until(terminal: int, text: str) -> None:
    """Read from a terminal until a text appears."""
    seen, end = b"", time.monotonic() + _SECONDS
    while text.encode() not in seen:
        left = end - time.monotonic()
        if left <= 0 or not select.select([terminal], [], [], left)[0]:
            raise AssertionError(f"{text!r} did not appear in {seen!r}")
        seen += os.read(terminal, 65536)


@pytest.mark.programs
@pytest.mark.parametrize(("typed", "completed"), CASES)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_completes_in_an_interactive_shell(
    shell: str, typed: str, completed: str, environment: dict[str, str]
) -> None:
    options = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}[shell]
    prepare = {"bash": "", "zsh": "autoload -Uz compinit; compinit -u; unsetopt BEEP; "}[shell]
    with _shell([_require(shell), *options], environment) as terminal:
        # The echo of the command has quotes between the letters of the mark, so only its output matches.
        os.write(terminal, f"{prepare}{SOURCES[shell]}; echo re''ady\n".encode())
        _read_until(terminal, "ready")
        os.write(terminal, f"{typed}\t".encode())
        _read_until(terminal, completed)  # the shell echoes what was typed, and adds the rest


@pytest.mark.programs
@pytest.mark.parametrize(("typed", "completed"), CASES)
def test_fish_completes(typed: str, completed: str, environment: dict[str, str]) -> None:
    command = f"{SOURCES['fish']}; complete -C {shlex.quote(typed)}"
    done = subprocess.run(
        [_require("fish"), "--no-config", "-c", command], capture_output=True, text=True, env=environment, check=True
    )
    words = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    assert completed.rpartition(" ")[2] in words


def test_the_documentation_names_these_commands() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert all(source in page for source in SOURCES.values())
