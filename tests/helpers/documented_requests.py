"""The requests of the README and the documentation, as curl sends them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.helpers.shell import fenced_blocks, split_commands

if TYPE_CHECKING:
    from pathlib import Path

    from tests.helpers.shell import Command

#: The address of the server in the documentation.
_ADDRESS = "localhost:8000"
#: Pages whose requests another server answers.
_OTHER_SERVERS = frozenset({"docs/ray.md"})


def documented_requests(path: str) -> list[Command]:
    """Return the different requests to a path of the server, such as "/readyz"."""
    found: dict[tuple[str, ...], Command] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if page.relative_to(ROOT).as_posix() in _OTHER_SERVERS:
            continue
        for _, language, content in fenced_blocks(page.read_text(encoding="utf-8")):
            for command in split_commands(content) if language == "sh" else ():
                if command.words[:1] == ["curl"] and any(word.endswith(_ADDRESS + path) for word in command.words):
                    found.setdefault(tuple(command.words), command)
    return list(found.values())


def send(request: Command, port: int, directory: Path) -> bytes:
    """Run curl in a directory, write the files that the request names, and return its output. A refusal is an error."""
    words = [word.replace(_ADDRESS, f"127.0.0.1:{port}") for word in request.words]
    command = [*words, "--fail-with-body", "--silent", "--show-error", "--max-time", "240"]
    try:
        sent = subprocess.run(command, cwd=directory, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no curl (Debian: apt-get install curl)")
    assert sent.returncode == 0, (request.words, sent.stdout, sent.stderr)
    for name in request.writes:
        (directory / name).write_bytes(sent.stdout)
    return sent.stdout
