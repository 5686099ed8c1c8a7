"""Fixtures with the real model: a mini checkpoint of random weights, a clip that espeak-ng spoke, a baked state."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import made_once, run_cli

if TYPE_CHECKING:
    from chatterbox_prewarm.start.attach import Attached


@pytest.fixture(scope="session")
def mini(shared: Path) -> Path:
    """A mini checkpoint, made by the command line. Read-only by agreement: copy it to change it."""

    def synthesize(directory: Path) -> None:
        made = run_cli("weights", "synthesize", directory, "--size", "mini")
        assert made.returncode == 0, made.stderr
        assert "noise" in made.stdout

    return made_once(shared / "weights" / "mini", synthesize)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of synthetic speech, 22 kHz mono."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed (Debian: apt-get install espeak-ng)")
    path = tmp_path_factory.mktemp("clip") / "speech.wav"
    text = "The quick brown fox jumps over the lazy dog, and the dog does not seem to mind."
    subprocess.run(["espeak-ng", "-w", str(path), text], check=True)
    return path


@pytest.fixture(scope="session")
def baked(mini: Path, clip: Path, shared: Path) -> Path:
    """A warm state of the mini checkpoint that compiles nothing, with the voice `fox` beside the built-in one."""
    return _baked(mini, shared / "baked", "--profile", "eager", "--voice", f"fox={clip}")


@pytest.fixture(scope="session")
def baked_aot(mini: Path, shared: Path) -> Path:
    """A warm state with ahead-of-time packages, for the profile that a bake takes by default."""
    return _baked(mini, shared / "baked-aot", "--levels", "1")


@pytest.fixture(scope="session")
def baked_compiled(mini: Path, shared: Path) -> Path:
    """A warm state with a cache of Inductor's; it is bound to the cache path, `cache` beside it."""
    return _baked(mini, shared / "baked-compiled", "--profile", "compiled", "--levels", "1")


def _baked(weights: Path, place: Path, *arguments: str) -> Path:
    if "eager" not in arguments:
        if shutil.which("g++") is None:
            pytest.skip("there is no C++ compiler (Debian: apt-get install g++)")
        if "compiled" in arguments and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            pytest.skip("torch.compile needs Python's headers (Debian: apt-get install python3-dev)")

    def bake(warm: Path) -> None:
        result = run_cli("bake", "--weights", weights, "--warm", warm, "--cache", place / "cache", *arguments)
        assert result.returncode == 0, result.stderr

    return made_once(place / "warm", bake)


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where a process cannot be set apart."""
    tried = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        pytest.skip(f"a process cannot be set apart here: {tried.stderr.strip()}")


@pytest.fixture(scope="session")
def attached(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Attached:
    """The model in this process, loaded without a warm state."""
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.prepare import prepare

    cache = tmp_path_factory.mktemp("cache")
    return attach(prepare(Path("/nonexistent"), mini, cache=cache, policy="off"))
