"""What all tests share: the command line as a user has it, and what a machine must have for a group of tests."""

from __future__ import annotations

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

# A shell that starts us in the background has SIGINT ignored, and what tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Sharing(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Of the tests by several workers: one has all with containers, and those of any other file stay together.

    Those with containers share an engine and wait for its disk, so that they leave the processors to the others.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "containers" if _has_containers(file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Sharing:
    """Not pytest-xdist 3.8's own `loadgroup`, whose groups pytest 9.2 does not let through."""
    return Sharing(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with the tests with containers, which take longest; one ends with them."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not _has_containers(item.nodeid))


def _has_containers(nodeid: str) -> bool:
    return nodeid.startswith("tests/image/")


def made_once(product: Path, make: Callable[[Path], None]) -> Path:
    """What the first of several workers makes, all at once, and the others wait for."""
    product.parent.mkdir(exist_ok=True)
    with FileLock(product.with_name(f"{product.name}.lock")):
        if not product.exists():
            make(product)
    return product


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def writable_copy(baked: Path, target: Path) -> Path:
    """A copy of a warm state that may be damaged."""
    shutil.copytree(baked, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def run_cli(
    *arguments: str | Path, timeout: float = 600.0, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `chatterbox-prewarm ARGUMENTS` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "chatterbox_prewarm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=env,
        cwd=cwd,
    )


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory for sockets, whose whole paths are to have at most 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as place:
        yield Path(place)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
