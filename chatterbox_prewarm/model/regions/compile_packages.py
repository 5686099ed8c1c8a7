"""Compile regions ahead of time into packages with AOTInductor, several at a time.

PyTorch's loader unpacks a `.pt2` archive into the temporary folder at every start. This fails if that folder forbids
execution, as a container's tmpfs does by default. So the archive is unpacked once, here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import shutil
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from chatterbox_prewarm.errors import ModelError, as_prewarm_error, first_line
from chatterbox_prewarm.model.regions.executors import LIBRARY
from chatterbox_prewarm.model.regions.region import REGIONS
from chatterbox_prewarm.redaction import print_traceback
from chatterbox_prewarm.system.children import PARENT, die_with_parent
from chatterbox_prewarm.system.cpus import usable_cpus
from chatterbox_prewarm.system.gpu_stand_in import stand_in_target
from chatterbox_prewarm.system.json_subprocess import DEBUG, describe, quiet_packages, rebuild
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.system.progress import detail

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from chatterbox_prewarm.model.regions.region import Region, Size

    #: Shape, stride, dtype and device of a weight. It can be sent to another process.
    Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, str]

_KERNEL_SUFFIXES = frozenset({".cubin", ".hsaco", ".spv"})
#: Inductor's settings without a GPU: read no constants from the device, do not time paddings, generate the code in one
#: pass (the other way runs the model in between), and use no vector instructions that only this processor may have.
_STAND_IN_SETTINGS: Mapping[str, Any] = {
    "joint_graph_constant_folding": False,
    "shape_padding": False,
    "triton.autotune_at_compile_time": True,
    "cpp.simdlen": 1,
}
#: A compiling process needs about 1 GB of memory and, on a GPU, its own context.
_MAX_WORKERS = 8


def compile_packages(weights: Mapping[str, Sequence[torch.Tensor]], directory: Path) -> None:
    """Compile regions, several at a time. Each finished package is a detail of the present work.

    Args:
        weights: of any instance of each region, by the region's name. Only layouts and dtypes matter, not values.
        directory: gets a folder for each package.

    Raises:
        ModelError: a compiling process failed or was killed.
    """
    threads = max(int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") or usable_cpus()), 1)
    # On a GPU compile one region at a time: Inductor chooses kernels by timing them, which needs an idle GPU. Its own
    # pool compiles the kernels in parallel.
    on_gpu = any(weight.is_cuda for tensors in weights.values() for weight in tensors)
    workers = 1 if on_gpu and stand_in_target() is None else min(threads, len(weights), _MAX_WORKERS)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(threads // workers, 1))
    os.environ[PARENT] = str(os.getpid())
    # Start with the regions that have the most weights. They have the most code, and the last one should be short.
    waiting = sorted(weights, key=lambda name: len(weights[name]))
    running: dict[Future[dict[str, Any] | None], str] = {}
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the inherited GPU context
    with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
        while waiting or running:
            # Do not submit everything at once, or a failure would be reported only when most regions are done.
            while waiting and len(running) < workers:
                name = waiting.pop()
                layouts = [
                    (tuple(weight.shape), weight.stride(), weight.dtype, str(weight.device)) for weight in weights[name]
                ]
                running[pool.submit(_compile_in_child, name, layouts, directory / name)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    failure = future.result()
                except BrokenProcessPool as error:
                    raise ModelError(
                        f"a compiling process was killed while it compiled {name} or another region",
                        next_step=f"if memory ran out, provide more: {workers} process(es) with about 1 GB each; "
                        "TORCHINDUCTOR_COMPILE_THREADS=1 runs only one process",
                    ) from error
                if failure is not None:
                    raise rebuild(failure)
                done = len(weights) - len(waiting) - len(running)
                detail(f"compiled {name}, {done} of {len(weights)}", share=done / len(weights))


def _compile_in_child(name: str, layouts: Sequence[Layout], directory: Path) -> dict[str, Any] | None:
    """Compile one package in a process of the pool and return the error, if any, as JSON-ready values."""
    quiet_packages()
    try:
        weights = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in layouts
        ]
        compile_package(REGIONS[name], weights, directory)
    except Exception as error:  # noqa: BLE001 - the parent process reports every error
        if os.environ.get(DEBUG):
            print_traceback()
        return describe(as_prewarm_error(error))
    return None


def compile_package(region: Region, weights: Sequence[torch.Tensor], directory: Path) -> None:
    """Compile a region for the device and the dtype of `weights`. This takes tens of seconds.

    Args:
        region: the region to compile.
        weights: of any instance of the region. Only layouts and dtypes matter, not values.
        directory: of the package; created here.

    Raises:
        ModelError: the compiler failed.
        OSError: the disk is full.
    """
    device, dtype = weights[0].device, weights[0].dtype
    inputs = tuple(given.example(device, dtype) for given in region.inputs)
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-package-") as scratch, torch.no_grad():
        if device.type == "cuda":
            _find_toolkit()
            _find_driver(Path(scratch), Path("/proc/self/maps").read_text(encoding="utf-8"))
        archive = Path(scratch) / f"{region.name}.pt2"
        shapes = (_dynamic_shapes(region, len(weights)),)
        try:
            exported = torch.export.export(_AsModule(region), (*weights, *inputs), dynamic_shapes=shapes, strict=False)
            with _quiet_compiler(Path(scratch) / "log"), _untimed_kernels():
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(archive), inductor_configs=_settings()
                )
        except Exception as error:
            if _is_disk_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), scratch) from error
            raise ModelError(
                f"the region {region.name} cannot be compiled: {first_line(error)}",
                next_step="install a C++ compiler (g++), and for a GPU CUDA's headers and libcuda.so (CUDA_HOME); "
                "or bake with --profile eager",
            ) from error
        _unpack(archive, directory)


def _settings() -> dict[str, Any]:
    """Return Inductor's settings for packages."""
    # Use the number of threads that the process has, not the number that the bake had.
    settings: dict[str, Any] = {"cpp.dynamic_threads": True}
    if hasattr(torch._inductor.config.aot_inductor, "precompile_headers"):
        # Torch 2.11 stores precompiled headers in /tmp under a predictable name.
        settings["aot_inductor.precompile_headers"] = False
    if stand_in_target() is not None:
        settings |= _STAND_IN_SETTINGS
    return settings


@contextlib.contextmanager
def _untimed_kernels() -> Iterator[None]:
    """Without a GPU, let Inductor take the first configuration of each kernel, because none can be timed."""
    if stand_in_target() is None:
        yield
        return
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    tuner: Any = CachingAutotuner
    benchmark = tuner.benchmark_all_configs
    tuner.benchmark_all_configs = lambda self, *_, **__: dict(zip(self.launchers, itertools.count(), strict=False))
    try:
        yield
    finally:
        tuner.benchmark_all_configs = benchmark


def _is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error or one of its causes reports a full disk. Compilers report it only in their message."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _find_toolkit() -> None:
    """Make the compiler find CUDA's headers in the wheels that torch depends on, if no toolkit is installed."""
    installed = {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() or shutil.which("nvcc")
    if installed or Path("/usr/local/cuda/include/cuda.h").exists():
        return
    packages = Path(sysconfig.get_paths()["purelib"])
    for name in ("cuda_runtime", "cu13"):  # the names in CUDA 12's and in CUDA 13's wheels
        if (packages / "nvidia" / name / "include" / "cuda.h").exists():
            os.environ["CUDA_HOME"] = str(packages / "nvidia" / name)
            break
    # NVIDIA's wheel of the runtime lacks the headers in `crt`, which its own headers include. Triton's wheel has them.
    headers = packages / "triton" / "backends" / "nvidia" / "include"
    if headers.is_dir():
        os.environ.setdefault("CUDA_INC_PATH", str(headers))


def _find_driver(folder: Path, maps: str) -> None:
    """Make the linker find the driver's library, which may be installed only under a name with a version.

    Args:
        folder: gets a link `libcuda.so` to the library that this process has loaded.
        maps: the content of `/proc/self/maps`.
    """
    mapped = (line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6)
    for path in map(Path, mapped):
        if path.name.startswith("libcuda.so"):
            (folder / "libcuda.so").symlink_to(path)
            paths = (str(folder), *filter(None, [os.environ.get("LIBRARY_PATH")]))
            os.environ["LIBRARY_PATH"] = os.pathsep.join(paths)
            return


class _AsModule(torch.nn.Module):
    """A region as a module, because `torch.export` takes only modules."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self._region = region

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._region.function(*arguments)


@contextlib.contextmanager
def _quiet_compiler(log: Path) -> Iterator[None]:
    """Write a compiler's output to `log`, and copy it to the standard error only if the compiler fails."""
    sys.stderr.flush()
    standard_error = os.dup(2)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    except BaseException:
        sys.stderr.flush()
        os.write(standard_error, log.read_bytes())
        raise
    finally:
        sys.stderr.flush()
        os.dup2(standard_error, 2)
        os.close(standard_error)


def _dynamic_shapes(region: Region, weights: int) -> tuple[dict[int, Any] | None, ...]:
    """Return, for each argument, its variable dimensions in the format of `torch.export`."""
    lengths: dict[str, Any] = {}

    def dimension(size: Size) -> Any:
        length = lengths.setdefault(size.name, torch.export.Dim(size.name, min=size.minimum, max=size.maximum))
        if size.factor != 1:
            length = size.factor * length
        return length + size.offset if size.offset > 0 else length - -size.offset if size.offset else length

    inputs = ({index: dimension(size) for index, size in given.dynamic.items()} or None for given in region.inputs)
    return (*(None,) * weights, *inputs)


def _unpack(archive: Path, directory: Path) -> None:
    """Extract the library and its kernels from a `.pt2` archive."""
    directory.mkdir(parents=True)
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            path = PurePosixPath(name)
            target = LIBRARY if path.suffix == ".so" else path.name if path.suffix in _KERNEL_SUFFIXES else None
            if target is not None:
                with files.open(name) as source, (directory / target).open("xb") as out:
                    shutil.copyfileobj(source, out)
    if shutil.which("strip"):  # unused symbol names are a sixth of a library
        run_process(["strip", "--strip-unneeded", str(directory / LIBRARY)])
