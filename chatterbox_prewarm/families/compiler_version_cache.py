"""Cached answers of compilers to `--version`.

Inductor runs `g++ --version` and Triton runs `ptxas --version` in every process, because their cache keys contain the
version. Both do so even if every look-up hits. The bake saves the answers, so that a warm start runs no compiler and
works without one.
"""

from __future__ import annotations

import json
import os
import subprocess
import types
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "compiler.json"
_VERSION_OPTIONS = frozenset({"--version", "-v"})


def load_versions(directory: Path | None) -> dict[str, str]:
    """Read the answers, by command line, from a verified folder of the warm state; empty without a folder."""
    if directory is None:
        return {}
    answers: dict[str, str] = json.loads(read_regular(directory / _FILE))
    return answers


def save_versions(answers: dict[str, str], directory: Path) -> None:
    """Write the answers into a folder of the warm state."""
    (directory / _FILE).write_text(json.dumps(answers, indent=1, sort_keys=True), encoding="ascii")


def cache_versions(module: Any, answers: dict[str, str]) -> None:
    """Make a module that imported `subprocess` take compiler versions from `answers`, and store new ones there."""

    def check_output(args: Any, **settings: Any) -> Any:
        words = [str(word) for word in args] if isinstance(args, (list, tuple)) else [str(args)]
        if len(words) != 2 or words[1] not in _VERSION_OPTIONS:
            return subprocess.check_output(args, **settings)
        command = " ".join(words)
        if command not in answers:
            answers[command] = os.fsdecode(subprocess.check_output(args, **settings))
        return answers[command] if settings.get("text") else os.fsencode(answers[command])

    module.subprocess = types.SimpleNamespace(**{**vars(subprocess), "check_output": check_output})
