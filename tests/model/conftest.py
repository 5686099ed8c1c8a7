"""Fixtures with the real model: a mini checkpoint of random weights, a generated clip, a baked state."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import soundfile

from chatterbox_prewarm.model.reference_clip import reference_audio
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.conftest import build_once, run_cli
from tests.helpers.newest_target import NEWEST_TARGET

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.start.attach import Attached
    from chatterbox_prewarm.weights.variants import Variant


@pytest.fixture(scope="session")
def checkpoint(shared_dir: Path) -> Callable[[Variant], Path]:
    """Return a function that makes a mini checkpoint of a variant, once. Tests share it: copy it to change it."""

    def make(variant: Variant) -> Path:
        def synthesize(directory: Path) -> None:
            made = run_cli("weights", "synthesize", directory, "--size", "mini", "--variant", variant.name)
            assert made.returncode == 0, made.stderr
            assert "noise" in made.stdout
            assert "length =" not in made.stdout, "pkuseg prints what it reads"

        return build_once(shared_dir / "weights" / f"mini-{variant.name}", synthesize)

    return make


@pytest.fixture(scope="session")
def mini(checkpoint: Callable[[Variant], Path]) -> Path:
    """Return a mini checkpoint of the English model."""
    return checkpoint(ENGLISH)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write five seconds of generated, speech-like sound: 16-bit mono at 22,050 Hz, a rate that must be resampled."""
    path = tmp_path_factory.mktemp("clip") / "speech.wav"
    soundfile.write(path, reference_audio(5.0, sample_rate=22_050), 22_050, subtype="PCM_16")
    return path


@pytest.fixture(scope="session")
def baked(mini: Path, clip: Path, shared_dir: Path) -> Path:
    """Bake the profile `eager`, which compiles nothing, with the built-in voice and the voice `fox`."""
    return _bake(
        mini, shared_dir / "baked", "--profile", "eager", "--levels", "1", "--voice", f"fox={clip}", quiet=True
    )


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skip the test where there is no C++ compiler."""
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler (Debian: apt-get install g++)")


@pytest.fixture(scope="session")
def baked_aot(mini: Path, shared_dir: Path, compiler: None) -> Path:  # noqa: ARG001 - may skip
    """Bake ahead-of-time packages: the default profile."""
    return _bake(mini, shared_dir / "baked-aot", "--levels", "1", quiet=True)


@pytest.fixture(scope="session")
def baked_compiled(mini: Path, shared_dir: Path, compiler: None) -> Path:  # noqa: ARG001 - may skip
    """Bake Inductor's cache. It works only with its cache path: the directory `cache` next to the state."""
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        pytest.skip("torch.compile needs Python's headers (Debian: apt-get install python3-dev)")
    return _bake(mini, shared_dir / "baked-compiled", "--profile", "compiled", "--levels", "1")


@pytest.fixture(scope="session")
def cross_compiled(mini: Path, shared_dir: Path, compiler: None) -> Path:  # noqa: ARG001 - may skip
    """Bake for a GPU that this machine does not have. Without CUDA graphs, every region gets a package."""
    return _bake(mini, shared_dir / "cross-compiled", "--device", "cuda", "--target", NEWEST_TARGET, "--no-graphs")


def _bake(weights: Path, directory: Path, *arguments: str, quiet: bool = False) -> Path:
    """Bake a state; `quiet`: other packages and compilers must not print."""

    def bake(warm: Path) -> None:
        result = run_cli("bake", "--weights", weights, "--warm", warm, "--cache", directory / "cache", *arguments)
        assert result.returncode == 0, result.stderr
        assert not (quiet and result.stderr), result.stderr

    return build_once(directory / "warm", bake)


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip the test where a process cannot be isolated."""
    tried = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount", "true"], capture_output=True, text=True
    )
    if tried.returncode != 0:
        pytest.skip(f"Linux namespaces are not available: {tried.stderr.strip()}")


@pytest.fixture(scope="session")
def attached(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Attached:
    """Load the model into the test process, without a warm state."""
    from chatterbox_prewarm.start.attach import attach
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.start.prepare import prepare

    cache = tmp_path_factory.mktemp("cache")
    return attach(prepare(StartOptions(warm=Path("/nonexistent"), weights=mini, cache=cache, policy="off")))


@pytest.fixture(scope="session")
def upstream(attached: Attached) -> ChatterboxTTS:
    """Load upstream's model with the tensors of `attached`."""
    from chatterbox_prewarm.start.upstream import attach_upstream

    return attach_upstream(attached.prepared, lean=attached.synthesizer.model)
