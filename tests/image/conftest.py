"""What image tests need: an engine that answers, a client that it can build with, and the Dockerfile's base image."""

from __future__ import annotations

import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bench.image import docker as client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BASE = "debian:bookworm-slim"


@pytest.fixture(scope="session")
def docker() -> str:
    """The client's program; skips, saying what is missing."""
    program = client()
    if shutil.which(program) is None:
        pytest.skip(f"there is no Docker client {program!r} (Debian: apt-get install docker.io)")
    if subprocess.run([program, "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no Docker engine answers; start dockerd, or set DOCKER_HOST")
    if subprocess.run([program, "image", "inspect", BASE], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"there is no image {BASE}; make it with build/base-image")
    return program


@pytest.fixture
def small_engine(docker: str, tmp_path: Path) -> Iterator[str]:
    """A Docker engine of its own with 200 MB for images; its address."""
    if (program := shutil.which("dockerd", path="/usr/sbin:/usr/bin:/usr/local/bin")) is None:
        pytest.skip("there is no dockerd to start (Debian: apt-get install docker.io)")
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(data)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    address = f"unix://{run}/docker.sock"
    # In a network of its own: an engine that starts without a bridge removes that of the one that runs already.
    command = ["unshare", "--net", program, "--data-root", data, "--exec-root", run / "exec", "--pidfile", run / "pid"]
    command += ["--host", address, "--bridge", "none", "--iptables=false", "--ip-masq=false"]
    run.mkdir()
    with (run / "log").open("wb") as log, subprocess.Popen(list(map(str, command)), stderr=log) as engine:
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
            subprocess.run(["umount", "--lazy", str(data)], check=True)
