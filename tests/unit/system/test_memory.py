"""The usable memory, with the files of both versions of control groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.system.memory import usable_memory

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    """Write the table of a machine with 8 GiB available."""
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n")
    return path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 8 * GIB), (str(4 * GIB), 4 * GIB), (str(32 * GIB), 8 * GIB), ("no", 8 * GIB)]
)
def test_the_limit_of_version_2(limit: str, expected: int, tmp_path: Path, meminfo: Path) -> None:
    write(tmp_path / "groups", "0::/pod/container")
    write(tmp_path / "mount/pod/memory.max", limit)
    write(tmp_path / "mount/pod/container/memory.max", "max")
    assert usable_memory(tmp_path / "mount", tmp_path / "groups", meminfo) == expected


@pytest.mark.parametrize(("limit", "expected"), [(str(2 * GIB), 2 * GIB), (str(2**63 - 4096), 8 * GIB)])
def test_the_limit_of_version_1(limit: str, expected: int, tmp_path: Path, meminfo: Path) -> None:
    write(tmp_path / "groups", "5:memory:/docker/abc\n4:cpu:/other\n0::/")
    write(tmp_path / "mount/memory/memory.limit_in_bytes", limit)
    assert usable_memory(tmp_path / "mount", tmp_path / "groups", meminfo) == expected


def test_this_machine_has_memory() -> None:
    assert 64 << 20 < usable_memory() < 1 << 50
