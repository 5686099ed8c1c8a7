"""Check what this machine can do: bake, serve and build. The checks change nothing and do not import the model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, EngineError, ModelError, PrewarmError, WeightsError
from chatterbox_prewarm.image.build_request import BUILD_BYTES
from chatterbox_prewarm.image.engines.connect import connect
from chatterbox_prewarm.proof.prove import check_namespaces
from chatterbox_prewarm.system.compiler import missing_packages
from chatterbox_prewarm.system.cpus import usable_cpus
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.fingerprint import ABSENT, read_fingerprint, upstream_installed, visible_gpus
from chatterbox_prewarm.system.gpu_stand_in import newest_capability
from chatterbox_prewarm.system.gpu_targets import architecture
from chatterbox_prewarm.system.memory import usable_memory
from chatterbox_prewarm.system.paths import require_execution
from chatterbox_prewarm.weights.checkpoints import checkpoints_in
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

#: The uses of a machine.
USES = ("bake", "serve", "build")
_MODEL = ("bake", "serve")
#: Packages of the extras, by the names of their modules; the first one that is missing is named.
_LEAN = ("torch", "numpy", "safetensors", "tokenizers", "soundfile", "soxr", "starlette", "uvicorn", "pydantic")
_UPSTREAM = ("transformers", "librosa", "numba", "torchaudio", "perth", "pkg_resources")
#: Peak memory in bytes: of a warm start, and of the cold start in a bake (README.md, "Measurements").
_MEMORY = {"serve": 3_400_000_000, "bake": 4_700_000_000}
#: Free bytes for a state and the caches of its bake.
_STATE_BYTES = 1_000_000_000
#: The wheel with the runtime of each major version of CUDA, and the oldest driver that it runs with
#: (https://docs.nvidia.com/deploy/cuda-compatibility, "minor version compatibility").
_CUDA = {"12": ("nvidia-cuda-runtime-cu12", (525, 60)), "13": ("nvidia-cuda-runtime", (580, 65))}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to check.

    Attributes:
        device: torch device of a bake and of a server; "" for the GPU if there is one.
        weights, warm, cache: as for `bake`.
        engine: of `build`.
    """

    device: str
    weights: Path
    warm: Path
    cache: Path
    engine: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a check.

    Attributes:
        subject: what was checked.
        seen: what is there.
        blocks: the uses that cannot work.
        next_step: advice; "" if there is nothing to do.
        error: the kind of the error that a blocked use would end with.
    """

    subject: str
    seen: str
    blocks: tuple[str, ...] = ()
    next_step: str = ""
    error: type[PrewarmError] = field(default=ModelError)


def examine(request: Request) -> list[Finding]:
    """Run all checks."""
    checks: Sequence[Callable[[Request], Iterator[Finding]]] = (
        *(_cpu_and_memory, _gpu, _packages, _compiler),
        *(_weights, _disk, _cache, _namespaces, _engine),
    )
    return [finding for check in checks for finding in check(request)]


def require(findings: Sequence[Finding], uses: Sequence[str]) -> None:
    """Check that nothing blocks a use.

    Raises:
        PrewarmError: something does. It has the class of the first such finding.
    """
    blocking = [finding for finding in findings if set(finding.blocks) & set(uses)]
    if blocking:
        names = [use for use in uses if any(use in finding.blocks for finding in blocking)]
        raise blocking[0].error(
            f"this machine cannot {' or '.join(names)}: "
            + "; ".join(f"{finding.subject}: {finding.seen}" for finding in blocking),
            next_step="; ".join(dict.fromkeys(finding.next_step for finding in blocking)),
        )


def _finding(subject: str, error: PrewarmError, blocks: Sequence[str]) -> Finding:
    return Finding(
        subject=subject, seen=error.message, blocks=tuple(blocks), next_step=error.next_step, error=type(error)
    )


def _cpu_and_memory(_: Request) -> Iterator[Finding]:
    memory, cpu = usable_memory(), read_fingerprint()
    yield Finding(subject="CPU", seen=f"{usable_cpus()} usable, {cpu.cpu_model} ({cpu.arch})")
    blocks = tuple(use for use in _MODEL if memory < _MEMORY[use])
    yield Finding(
        subject="memory",
        seen=f"{memory / 1e9:.1f} GB usable",
        blocks=blocks,
        next_step=f"provide {max(_MEMORY[use] for use in blocks) / 1e9:.1f} GB or more" if blocks else "",
        error=BadInputError,
    )


def _gpu(request: Request) -> Iterator[Finding]:
    fingerprint = read_fingerprint(request.device or "cuda")
    if request.device:
        try:
            check_device(request.device)
        except PrewarmError as error:
            yield _finding("GPU", error, _MODEL)
            return
    if not visible_gpus():
        hint = "bake --target GPU compiles for a GPU that this machine lacks"
        driver = "" if fingerprint.driver == ABSENT else f", driver {fingerprint.driver}"
        yield Finding(subject="GPU", seen=f"no GPU{driver}: the model runs on the CPU", next_step=hint)
        return
    on_cpu = request.device.startswith("cpu")
    hint = "" if on_cpu else gpu_problem(fingerprint.driver, fingerprint.compute_capability)
    yield Finding(
        subject="GPU",
        seen=f"{fingerprint.gpu}, compute capability {fingerprint.compute_capability}, driver {fingerprint.driver}, "
        f"{visible_gpus()} visible",
        blocks=_MODEL if hint else (),
        next_step=hint,
    )


def gpu_problem(driver: str, capability: str) -> str:
    """Return advice if the installed torch cannot use a GPU, or "".

    Args:
        driver: the version of the driver, such as "550.54.14".
        capability: the compute capability of the GPU, such as "9.0".
    """
    for cuda, (runtime, oldest) in _CUDA.items():
        if _version(runtime) != ABSENT and tuple(map(int, driver.split(".")[:2])) < oldest:
            return f"upgrade the driver to {oldest[0]}.{oldest[1]} or newer, which CUDA {cuda} needs"
    newest = newest_capability(_version("torch"))
    if newest and tuple(map(int, capability.split("."))) > newest:
        return f"install the stack torch-2.11: this torch runs on GPUs up to {architecture(newest)}"
    return ""


def _packages(_: Request) -> Iterator[Finding]:
    missing = [name for name in _LEAN if importlib.util.find_spec(name) is None]
    yield Finding(
        subject="packages of a server",
        seen=f"{missing[0]} is missing" if missing else f"torch {_version('torch')}",
        blocks=_MODEL if missing else (),
        next_step="pip install 'chatterbox-prewarm[lean]'" if missing else "",
    )
    missing = [name for name in _UPSTREAM if importlib.util.find_spec(name) is None]
    if not upstream_installed():
        missing.insert(0, "chatterbox-tts")
    hint = "pip install 'setuptools<81'" if missing == ["pkg_resources"] else "pip install 'chatterbox-prewarm[model]'"
    yield Finding(
        subject="packages of upstream's model",
        seen=f"{missing[0]} is missing: a server can only use baked voices"
        if missing
        else f"chatterbox-tts {_version('chatterbox-tts')}",
        blocks=("bake",) if missing else (),
        next_step=hint if missing else "",
    )


def _compiler(_: Request) -> Iterator[Finding]:
    missing = missing_packages()
    here = f"{os.environ.get('CXX', 'g++')} and the Python headers"
    yield Finding(
        subject="compiler",
        seen=f"missing: {', '.join(missing)}" if missing else here,
        blocks=("bake",) if missing else (),
        next_step=f"apt-get install {' '.join(missing)}, or bake with --profile eager" if missing else "",
    )


def _weights(request: Request) -> Iterator[Finding]:
    try:
        records = {path: read_record(path) for path in checkpoints_in(request.weights).values()}
    except PrewarmError as error:
        yield Finding(
            subject="weights",
            seen=error.message,
            blocks=_MODEL,
            next_step=f"chatterbox-prewarm weights fetch {request.weights}",
            error=WeightsError,
        )
        return
    for path, record in records.items():
        size = sum(file.size for file in record.files)
        seen = f"{record.variant}, {size / 1e9:.1f} GB of {record.repository} in {path}"
        yield Finding(subject=f"weights of {record.variant}" if len(records) > 1 else "weights", seen=seen)


def _disk(request: Request) -> Iterator[Finding]:
    for subject, path in (("disk for the warm state", request.warm), ("disk for the cache", request.cache)):
        free = shutil.disk_usage(_existing(path)).free
        blocks = ("bake",) if free < _STATE_BYTES else ()
        yield Finding(
            subject=subject,
            seen=f"{free / 1e9:.1f} GB free at {path}",
            blocks=blocks,
            next_step=f"free {_STATE_BYTES / 1e9:.0f} GB, or name another path" if blocks else "",
            error=BadInputError,
        )


def _cache(request: Request) -> Iterator[Finding]:
    subject, folder = "cache path", _existing(request.cache)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        require_execution(folder)
    except BadInputError as error:
        yield _finding(subject, error, _MODEL)
    except OSError as error:
        yield Finding(
            subject=subject,
            seen=f"{request.cache} cannot be written: {error.strerror}",
            blocks=_MODEL,
            next_step="name another path with --cache, or make it writable",
            error=BadInputError,
        )
    else:
        yield Finding(subject=subject, seen=f"{request.cache} is writable, and libraries can be loaded from it")


def _namespaces(request: Request) -> Iterator[Finding]:
    try:
        check_namespaces(_existing(request.warm))
    except EngineError as error:
        yield _finding("isolation for `prove`", error, ())
    else:
        yield Finding(subject="isolation for `prove`", seen="namespaces are allowed")


def _engine(request: Request) -> Iterator[Finding]:
    subject = f"container engine {request.engine}"
    try:
        engine = connect(request.engine)
    except EngineError as error:
        yield _finding(subject, error, ("build",))
        return
    with contextlib.closing(engine):
        try:
            engine.check_device(request.device or "cpu")
        except EngineError as error:
            yield _finding(subject, error, ("build",))
            return
        free = engine.info.free_bytes
        space = "" if free is None else f", {free / 1e9:.0f} GB free"
        little = free is not None and free < BUILD_BYTES
        yield Finding(
            subject=subject,
            seen=f"{engine.info.name} {engine.info.version}, {'GPU' if engine.info.gpu else 'no GPU'}{space}",
            blocks=("build",) if little else (),
            next_step=f"a build needs about {BUILD_BYTES / 1e9:.0f} GB: remove images" if little else "",
            error=EngineError,
        )


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ABSENT
