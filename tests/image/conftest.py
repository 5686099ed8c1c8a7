"""Fixtures with container engines: Docker with the base image, the image of the Dockerfile, and podman."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from benchmarks.image import build, copy_context
from benchmarks.image import docker as client
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BASE = "debian:bookworm-slim"
TAG = "chatterbox-prewarm-test:warm"
#: Only level 1 of the warm-up: the other levels take minutes, and tests/model covers them.
SYNTHETIC = ("--build-arg", "WEIGHTS=synthetic", "--build-arg", "SIZE=mini", "--build-arg", "LEVELS=1")


@pytest.fixture(scope="session")
def docker() -> str:
    """Return the name of the Docker client; skip the test where the client, the engine or the base image is missing."""
    program = client()
    if shutil.which(program) is None:
        pytest.skip(f"there is no Docker client {program!r} (Debian: apt-get install docker.io)")
    if subprocess.run([program, "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no Docker engine answers; start dockerd, or set DOCKER_HOST")
    if subprocess.run([program, "image", "inspect", BASE], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"there is no image {BASE}; make it with build/base-image")
    return program


@pytest.fixture(scope="session")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the build context, so that a test can change a file."""
    return copy_context(ROOT, tmp_path_factory.mktemp("context") / "copy")


@pytest.fixture(scope="session")
def image(docker: str, context: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the image of the Dockerfile with a mini checkpoint of random weights; yield its tag."""
    pip = tmp_path_factory.mktemp("secrets") / "pip.conf"
    pip.write_text("[global]\ntimeout = 47\n")
    build(context, TAG, [*SYNTHETIC, "--secret", f"id=pip,src={pip}"])
    yield TAG
    subprocess.run([docker, "rmi", "--force", TAG], capture_output=True, check=False)


@contextlib.contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of this size on a new folder; skip the test where nothing can be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_engine(docker: str, tmp_path: Path, socket_dir: Path) -> Iterator[str]:
    """Start a separate Docker engine with 200 MB for images; yield its address."""
    if (program := shutil.which("dockerd", path="/usr/sbin:/usr/bin:/usr/local/bin")) is None:
        pytest.skip("there is no dockerd to start (Debian: apt-get install docker.io)")
    data, run = tmp_path / "data", socket_dir / "run"
    address = f"unix://{run}/docker.sock"
    # In a new network namespace: an engine that starts without a bridge removes the bridge of the running engine.
    command = ["unshare", "--net", program, "--data-root", data, "--exec-root", run / "exec", "--pidfile", run / "pid"]
    command += ["--host", address, "--bridge", "none", "--iptables=false", "--ip-masq=false"]
    run.mkdir()
    with (
        small_file_system(data, "200m"),
        (run / "log").open("wb") as log,
        subprocess.Popen(list(map(str, command)), stderr=log) as engine,
    ):
        try:
            for _ in range(60):
                if subprocess.run([docker, "--host", address, "info"], capture_output=True).returncode == 0:
                    break
                time.sleep(0.5)
            else:
                pytest.fail((run / "log").read_text()[-2000:])
            yield address
        finally:
            engine.terminate()
            engine.wait(30)


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The directories where podman stores everything during these tests."""

    root: Path
    driver: str

    def spooled(self) -> list[str]:
        """Return the temporary files that podman has not removed."""
        return sorted(path.name for path in (self.root.parent / "tmp").iterdir() if path.name != "buildah-cache")

    def layers(self) -> int:
        """Return the number of layers of all images."""
        return len(json.loads((self.root / f"{self.driver}-layers" / "layers.json").read_text()))


def copy_programs(root: Path, *programs: str) -> None:
    """Copy programs of this machine and their libraries to the root directory of an image."""
    for program in programs:
        found = shutil.which(program, path="/usr/bin:/bin")
        assert found is not None
        libraries = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
        for path in (f"/bin/{program}", *re.findall(r"(/\S+) \(0x", libraries)):
            copy = root / path.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found if path == f"/bin/{program}" else path, copy)


@contextlib.contextmanager
def podman_storage(folder: Path) -> Iterator[Storage]:
    """Let podman, also in subprocesses, store everything in this folder instead of the user's storage."""
    if shutil.which("podman") is None:
        pytest.skip("there is no podman (Debian: apt-get install podman)")
    if os.geteuid() != 0:
        pytest.skip("separate storage for podman needs root")
    root, driver = folder / "graph", "overlay"
    runtime = next((name for name in ("runc", "crun") if shutil.which(name)), "runc")
    (folder / "tmp").mkdir(parents=True)
    (folder / "containers.conf").write_text(
        f'[engine]\nruntime="{runtime}"\ncgroup_manager="cgroupfs"\nevents_logger="file"\nlock_type="file"\n'
        f'tmp_dir="{folder}/libpod"\n[containers]\ndefault_ulimits=["nofile=1024:1024","nproc=4096:4096"]\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))  # for temporary files and the cache mounts of builds
        patch.setenv("CONTAINERS_CONF", str(folder / "containers.conf"))
        patch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
        try:
            for driver in ("overlay", "vfs"):
                (folder / "storage.conf").write_text(
                    f'[storage]\ndriver="{driver}"\ngraphroot="{root}"\nrunroot="{folder}/run"\n'
                )
                started = subprocess.run(["podman", "info"], capture_output=True, text=True)
                if started.returncode == 0:
                    break
                shutil.rmtree(root, ignore_errors=True)
            else:
                pytest.skip(f"podman does not work here: {started.stderr.strip()}")
            yield Storage(root=root, driver=driver)
            for command in (["rm", "--all", "--force", "--time=0"], ["rmi", "--all", "--force"]):
                subprocess.run(["podman", *command], capture_output=True, check=True)
        finally:
            subprocess.run(["umount", "--lazy", str(root / driver)], capture_output=True)
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """Give podman new storage for the tests of a module."""
    with podman_storage(tmp_path_factory.mktemp("podman")) as new_storage:
        yield new_storage


@pytest.fixture
def small_storage(tmp_path: Path) -> Iterator[Storage]:
    """Give podman new storage on a file system of 100 MB for one test."""
    with small_file_system(tmp_path / "podman", "100m"), podman_storage(tmp_path / "podman" / "all") as new_storage:
        yield new_storage
