"""Test selection, distribution over processes, and fixtures that all test packages share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path(__file__).parent.parent

#: Test files that build images and run containers.
_CONTAINER_FILES = tuple(
    f"tests/image/test_{name}.py" for name in ("build", "full_disk", "image", "pod", "podman", "routes", "all_models")
)
assert all((ROOT / name).is_file() for name in _CONTAINER_FILES), "a file in _CONTAINER_FILES was renamed"

# A shell ignores SIGINT in the processes that it starts in the background, and the tests' subprocesses inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Give each pytest-xdist process whole test files, and give all container tests to one process.

    Container tests share one engine and mostly wait for the disk, so they leave the processors to the other process.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "containers" if _uses_containers(nodeid) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Replace pytest-xdist 3.8's `loadgroup`, because pytest 9.2 does not pass its groups through."""
    return FileScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the container tests before `-m` selects tests, and run them first, because they take longest."""
    for item in items:
        if _uses_containers(item.nodeid):
            item.add_marker(pytest.mark.containers)
    items.sort(key=lambda item: not _uses_containers(item.nodeid))


def _uses_containers(nodeid: str) -> bool:
    return nodeid.startswith(_CONTAINER_FILES)


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Call `build(path)` unless `path` exists; when several test processes call this at once, one builds."""
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            build(path)
    return path


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def writable_copy(baked: Path, target: Path) -> Path:
    """Copy a warm state to `target`, where a test may damage it."""
    shutil.copytree(baked, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def run_cli(
    *arguments: str | Path, timeout: float = 800.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `chatterbox-prewarm ARGUMENTS` in a subprocess."""
    return subprocess.run(
        [sys.executable, "-m", "chatterbox_prewarm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=env,
        cwd=cwd,
    )


def interrupt_cli(when: str, *arguments: str | Path) -> None:
    """Run a command, and interrupt it with SIGINT when it prints a step whose line contains `when`."""
    command = [sys.executable, "-m", "chatterbox_prewarm", "--progress", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if when in line:
                process.send_signal(signal.SIGINT)
                break
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 130


def run_benchmark(*arguments: str | Path, timeout: float = 800.0) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks ARGUMENTS` in a subprocess."""
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT)


@pytest.fixture
def lean_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide upstream's package, as in an image with the lean packages."""
    find = importlib.util.find_spec

    def find_all_but_upstream(name: str, package: str | None = None) -> Any:
        return None if name == "chatterbox" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_upstream)


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """Yield a directory with a short path: the path of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the mount point of a 64 kB file system; skip the test where nothing can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
