"""What compilers say about themselves: asked in every process, even when nothing is left to compile.

Inductor runs `g++ --version` and Triton `ptxas --version` to name their caches by. The answers of the bake are kept, so
that a warm start starts no compiler, and needs none to be there.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "compiler.json"
_QUESTIONS = frozenset({"--version", "-v"})


class Answers:
    """Stands for `subprocess` in a module: a program's answers about itself are given from memory.

    Attributes:
        known: by command line.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def stand_in(self, module: Any) -> None:
        """Take the place of `subprocess` in a module that imported it by that name."""
        module.subprocess = self

    def load(self, directory: Path | None) -> None:
        """Take the answers from a verified folder of the warm state; without one, forget all."""
        self.known = {} if directory is None else json.loads((directory / _FILE).read_text(encoding="ascii"))

    def save(self, directory: Path) -> None:
        """Write the answers into a folder of the warm state."""
        (directory / _FILE).write_text(json.dumps(self.known, indent=1, sort_keys=True), encoding="ascii")

    def check_output(self, args: Any, **settings: Any) -> Any:
        """As `subprocess.check_output`."""
        words = [str(word) for word in args] if isinstance(args, (list, tuple)) else [str(args)]
        question = " ".join(words)
        if len(words) != 2 or words[1] not in _QUESTIONS:
            return subprocess.check_output(args, **settings)
        if question not in self.known:
            self.known[question] = os.fsdecode(subprocess.check_output(args, **settings))
        answer = self.known[question]
        return answer if settings.get("text") else os.fsencode(answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)
