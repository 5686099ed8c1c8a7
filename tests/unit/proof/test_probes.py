"""Test that the probes report every forbidden action of a warm process, even if it fails, and nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.proof import probes
from tests.helpers.children import call

if TYPE_CHECKING:
    from pathlib import Path


def observe(tmp_path: Path, action: str) -> dict[str, Any]:
    """Do one action in another process, and return the report of the probes."""
    warm = tmp_path / "warm"
    warm.mkdir()
    (warm / "kept").write_text("baked")
    (tmp_path / "outside").write_text("not baked")
    return call("probed", warm=str(warm), action=action)


@pytest.mark.parametrize("action", ["nothing", "write elsewhere"])
def test_reading_the_state_and_writing_elsewhere_are_not_reported(tmp_path: Path, action: str) -> None:
    assert observe(tmp_path, action) == {"network": [], "programs": [], "writes": []}


@pytest.mark.parametrize(
    ("action", "event"),
    [
        ("write", "open "),
        ("append", "open "),
        ("make a folder", "os.mkdir "),
        ("remove", "os.remove "),
        ("rename into", "os.rename "),
        ("truncate", "os.truncate "),
        ("chmod", "os.chmod "),
        ("chmod the root", "os.chmod "),
    ],
)
def test_every_change_of_the_state_is_reported(tmp_path: Path, action: str, event: str) -> None:
    report = observe(tmp_path, action)
    assert len(report["writes"]) == 1
    assert report["writes"][0].startswith(event)
    assert (report["network"], report["programs"]) == ([], [])


@pytest.mark.parametrize("action", ["getaddrinfo", "gethostbyname", "connect"])
def test_every_network_attempt_is_reported(tmp_path: Path, action: str) -> None:
    report = observe(tmp_path, action)
    assert len(report["network"]) == 1
    assert "127.0.0.1" in report["network"][0]
    assert (report["writes"], report["programs"]) == ([], [])


@pytest.mark.parametrize("action", ["Popen", "Popen with bytes", "Popen of a shell", "os.system"])
def test_the_start_of_a_compiler_is_reported_even_if_it_does_not_exist(tmp_path: Path, action: str) -> None:
    report = observe(tmp_path, action)
    assert len(report["programs"]) == 1
    assert probes.names_a_compiler(report["programs"][0])
    assert (report["network"], report["writes"]) == ([], [])


@pytest.mark.parametrize(
    "name", ["gcc", "x86_64-linux-gnu-gcc", "gcc-12", "g++", "ptxas-blackwell", "ninja", "cc1plus"]
)
def test_compilers_are_recognized_by_their_names(name: str) -> None:
    assert probes.COMPILER.fullmatch(name)


@pytest.mark.parametrize("name", ["lscpu", "gccfoo", "ldconfig", "python3", "bash", "asd"])
def test_other_programs_are_not_compilers(name: str) -> None:
    assert not probes.COMPILER.fullmatch(name)


def test_a_folder_with_a_similar_name_is_not_the_state(tmp_path: Path) -> None:
    observer = probes.Probes(warm=f"{tmp_path}/warm/")
    observer("open", (f"{tmp_path}/warmer/file", "w", os.O_WRONLY))
    observer("open", (f"{tmp_path}/warm.new", "w", os.O_WRONLY))
    assert observer.writes == []
    observer("open", (os.fsencode(f"{tmp_path}/warm/file"), None, os.O_RDWR))
    assert len(observer.writes) == 1


def test_can_write_leaves_no_file_behind(tmp_path: Path) -> None:
    assert probes.can_write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not probes.can_write(tmp_path / "missing")


def test_a_listing_shows_new_and_changed_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    changed, same = tmp_path / "inner" / "changed", tmp_path / "same"
    changed.write_bytes(b"1")
    same.write_bytes(b"1")
    before = probes.listing(tmp_path)
    assert set(before) == {str(changed), str(same)}
    changed.write_bytes(b"22")
    (tmp_path / "new").write_bytes(b"")
    after = probes.listing(tmp_path)
    assert {path for path in after if after[path] != before.get(path)} == {str(changed), str(tmp_path / "new")}


def test_the_packet_counters_of_the_kernel_never_decrease() -> None:
    first, second = probes.outgoing_packets(), probes.outgoing_packets()
    names = {"Tcp ActiveOpens", "Udp OutDatagrams", "Ip OutNoRoutes", "Udp6OutDatagrams", "Ip6OutNoRoutes"}
    assert set(first) == names
    assert all(second[name] >= count >= 0 for name, count in first.items())
    assert "lo" in probes.interfaces()
