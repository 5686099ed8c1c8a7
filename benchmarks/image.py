"""`benchmarks image`: build and prove an image with random weights, and again after a change of one Python file."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.starts import SCRATCH, machine
from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.engines.connect import prove_image
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TAG = "chatterbox-prewarm-bench:warm"
_CHANGED = "chatterbox_prewarm/serve/http/server.py"
#: Files and folders that a build reads, as in `.dockerignore`.
_CONTEXT = ("Dockerfile", ".dockerignore", "LICENSE", "NOTICE.md", "pyproject.toml", "build", "chatterbox_prewarm")


def run(checkout: Path, *, size: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Build and prove, change a file of the server, build and prove again; remove the images afterwards.

    Args:
        checkout: checkout of this project with its Dockerfile. A copy of it is changed.
        size: size of the random weights, "full" or "mini".
        say: called with one line for each step.

    Returns:
        the machine and its engine, and for each build the seconds, the steps that did not come from the cache, the
        bytes of the image, and the evidence of its proof. The seconds of the first build depend on the content of the
        build cache, so they are not comparable.

    Raises:
        BadInputError: the checkout has no Dockerfile.
        EngineError: a build or a container failed.
    """
    if not (checkout / "Dockerfile").is_file():
        raise BadInputError(f"{checkout} has no Dockerfile", next_step="name a checkout of this project")
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        context = copy_context(checkout, Path(scratch) / "context")
        try:
            first = _build_and_prove(context, size, say)
            with (context / _CHANGED).open("a", encoding="utf-8") as stream:
                # Different in each run, because the build cache has the layers of earlier runs.
                stream.write(f"\n# {os.urandom(20).hex()}\n")
            say(f"change {_CHANGED}")
            rebuild = _build_and_prove(context, size, say)
        finally:
            run_process([docker(), "rmi", "--force", _TAG])
    engine = run_process([docker(), "version", "--format", "{{.Server.Version}}"]).stdout.strip()
    return {
        "machine": machine(),
        "engine": engine,
        "size": size,
        "changed": _CHANGED,
        "first": first,
        "after a change": rebuild,
    }


def _build_and_prove(context: Path, size: str, say: Callable[[str], None]) -> dict[str, Any]:
    say("build")
    started = time.monotonic()
    log = build(context, _TAG, ("--build-arg", "WEIGHTS=synthetic", "--build-arg", f"SIZE={size}"))
    seconds = time.monotonic() - started
    say("prove")
    evidence = prove_image(_TAG)
    return {
        "build_seconds": round(seconds, 1),
        "steps": ran_steps(log),
        "image_bytes": _size(_TAG),
        "evidence": asdict(evidence),
    }


def copy_context(checkout: Path, target: Path) -> Path:
    """Copy the files that a build reads to `target`, and return it."""
    target.mkdir(parents=True)
    for name in _CONTEXT:
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(checkout / name, target / name)
    return target


def docker() -> str:
    """Return the Docker client: `$DOCKER` if it is set, for example to a version that matches the engine."""
    return os.environ.get("DOCKER", "docker")


def build(context: Path, tag: str, arguments: Sequence[str]) -> str:
    """Build an image; return the log, which lists each step and whether it came from the cache.

    If SSL_CERT_FILE is set, that CA bundle is passed as the secret `ca`.

    Raises:
        EngineError: the build failed. The message contains the end of its log.
    """
    bundle = os.environ.get("SSL_CERT_FILE")
    secrets = ["--secret", f"id=ca,src={bundle}"] if bundle else []
    command = [docker(), "build", "--network=host", "--progress=plain", *secrets, *arguments, "-t", tag, str(context)]
    finished = run_process(command, env={**os.environ, "DOCKER_BUILDKIT": "1"}, stderr=subprocess.STDOUT)
    if finished.returncode != 0:
        raise EngineError(
            f"the build ended with status {finished.returncode}: {finished.stdout[-5000:]}",
            next_step="see the end of its log above",
        )
    return finished.stdout


def ran_steps(log: str) -> list[str]:
    """Return the steps that ran, from BuildKit's plain log.

    The log has `#7 [installed 3/3] RUN …` for each step, and `#7 CACHED` for a step that came from the cache.
    """
    steps: dict[str, str] = {}
    for line in log.splitlines():
        number, _, rest = line.partition(" ")
        if rest.startswith("["):
            steps.setdefault(number, rest)
        elif rest.startswith("CACHED"):
            steps.pop(number, None)
    return [step for step in steps.values() if not step.startswith("[internal]") and " FROM " not in step]


def _size(tag: str) -> int:
    finished = run_process([docker(), "image", "inspect", "--format", "{{.Size}}", tag])
    return int(finished.stdout)
