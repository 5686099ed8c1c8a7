"""What image tests need: an engine that answers, a client that it can build with, and the Dockerfile's base image."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from chatterbox_prewarm.bench.image import docker as client

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
