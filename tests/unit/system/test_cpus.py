"""Test the number of usable CPUs with the files of both versions of control groups."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.system.cpus import REQUEST, usable_cpus

if TYPE_CHECKING:
    from pathlib import Path

ALL = len(os.sched_getaffinity(0))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", ALL),
        ("100000 100000", 1),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("6400000 100000", ALL),
        ("not a limit", ALL),
    ],
)
@pytest.mark.parametrize("group", ["/", "/kubepods/pod1/container", "/not/mounted/here"])
def test_the_limit_of_version_2(limit: str, expected: int, group: str, tmp_path: Path) -> None:
    write(tmp_path / "groups", f"0::{group}")
    folder = "" if group.startswith("/not") else group.lstrip("/")
    write(tmp_path / "mount" / folder / "cpu.max", limit)
    assert usable_cpus(tmp_path / "mount", tmp_path / "groups") == expected


def test_the_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    write(tmp_path / "groups", "0::/pod/container")
    write(tmp_path / "mount" / "pod" / "cpu.max", "100000 100000")
    write(tmp_path / "mount" / "pod" / "container" / "cpu.max", "max 100000")
    assert usable_cpus(tmp_path / "mount", tmp_path / "groups") == 1


@pytest.mark.parametrize(("quota", "expected"), [("-1", ALL), ("100000", 1), ("20000", 1)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_the_limit_of_version_1(quota: str, expected: int, controllers: str, tmp_path: Path) -> None:
    write(tmp_path / "groups", f"5:memory:/other\n4:{controllers}:/docker/abc\n0::/")
    write(tmp_path / "mount" / controllers / "cpu.cfs_quota_us", quota)
    write(tmp_path / "mount" / controllers / "cpu.cfs_period_us", "100000")
    assert usable_cpus(tmp_path / "mount", tmp_path / "groups") == expected


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "mount", tmp_path / "missing") == ALL
    assert 1 <= usable_cpus() <= ALL


@pytest.mark.parametrize(("request_", "expected"), [("1", 1), ("0", ALL), ("", ALL), ("64", ALL), ("two", ALL)])
def test_the_request_of_a_pod_is_not_exceeded(
    request_: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REQUEST, request_)
    write(tmp_path / "groups", "0::/")
    assert usable_cpus(tmp_path / "mount", tmp_path / "groups") == expected
