"""Check disk space and memory before a benchmark spends minutes."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.memory import usable_memory
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from pathlib import Path

#: Disk space in bytes of a baked state, and of everything else that a benchmark writes.
STATE_BYTES, OTHER_BYTES = 100_000_000, 300_000_000
#: Memory in bytes that a process needs in addition to the weights.
_PROCESS_BYTES = 2_000_000_000


def check_disk(directory: Path, needed: int, *, purpose: str) -> None:
    """Check the free space of the file system of a directory, which must exist.

    Args:
        directory: where the files will be written.
        needed: bytes.
        purpose: what needs them, such as "a report".

    Raises:
        BadInputError: there is too little space.
    """
    if (free := shutil.disk_usage(directory).free) < needed:
        raise BadInputError(
            f"{directory} has {free / 1e9:.1f} GB of free space, and {purpose} needs {needed / 1e9:.1f}",
            next_step="free some space, or name another folder",
        )


def check_memory(weights: Path, *, purpose: str, processes: int = 1, instead: str = "") -> None:
    """Check that a number of processes with a checkpoint fits into the available memory.

    Args:
        weights: directory of the checkpoint.
        purpose: what needs the memory, such as "a report".
        processes: how many processes load the checkpoint at the same time.
        instead: another way that needs less memory, for the error.

    Raises:
        BadInputError: there is too little memory.
        WeightsError: the checkpoint cannot be read.
    """
    needed = processes * (_PROCESS_BYTES + sum(file.size for file in read_record(weights).files))
    if (available := usable_memory()) < needed:
        raise BadInputError(
            f"{available / 1e9:.1f} GB of memory are available, and {purpose} needs {needed / 1e9:.1f}",
            next_step=f"end other processes{instead}",
        )
