"""The making of packages: regions compiled to shared libraries by AOTInductor, several at a time.

PyTorch's `.pt2` is an archive that its loader unpacks into the system's temporary folder at every start, which fails
where that folder forbids execution, as a container's tmpfs does by default. So it is unpacked once, here.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import sys
import sysconfig
import tempfile
import traceback
import zipfile
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from chatterbox_prewarm.errors import ModelError, as_prewarm_error, first_line
from chatterbox_prewarm.model.regions.packages import LIBRARY
from chatterbox_prewarm.model.regions.region import REGIONS
from chatterbox_prewarm.system.json_subprocess import DEBUG, describe, die_with_parent, quiet_packages, rebuild
from chatterbox_prewarm.system.process import PARENT
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from chatterbox_prewarm.model.regions.region import Region, Size

_KERNELS = frozenset({".cubin", ".hsaco", ".spv"})
#: A compiling process takes about a gigabyte, and on a GPU a context of its own.
_MOST_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """All that a compiler needs to know of a weight; travels to another process."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def tensor(self) -> torch.Tensor:
        """A tensor like it, of undefined content."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def make_packages(
    weights: Mapping[str, Sequence[torch.Tensor]], directory: Path, *, progress: Callable[[str], None]
) -> None:
    """Compile regions, several at a time.

    Args:
        weights: of any instance of each region, by its name: their shapes and dtypes count, their values do not.
        directory: where the packages go, a folder for each.
        progress: called with a line for each package made.

    Raises:
        ModelError: a compiler failed, or was killed.
    """
    threads = max(int(os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") or len(os.sched_getaffinity(0))), 1)
    # On a GPU one at a time: kernels are chosen by timing them, and must have it to themselves. Inductor's own pool
    # compiles them side by side.
    on_gpu = any(weight.is_cuda for tensors in weights.values() for weight in tensors)
    workers = 1 if on_gpu else min(threads, len(weights), _MOST_WORKERS)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(threads // workers, 1))
    os.environ[PARENT] = str(os.getpid())
    # Those of the most weights first: they have the most code, and the last to end should be a short one.
    waiting = sorted(weights, key=lambda name: len(weights[name]))
    running: dict[Future[dict[str, Any] | None], str] = {}
    context = multiprocessing.get_context("spawn")  # a fork would inherit a GPU's context, which cannot be used
    with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
        while waiting or running:
            # Not all at once, or a failure would be told when nearly all others are done.
            while waiting and len(running) < workers:
                name = waiting.pop()
                layouts = [_layout(weight) for weight in weights[name]]
                running[pool.submit(_make, name, layouts, directory / name)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                try:
                    failed = future.result()
                except BrokenProcessPool as error:
                    raise ModelError(
                        f"a compiling process was killed, while it made {name} or another region",
                        next_step=f"if it was out of memory, give the machine more: {workers} run at a time, about a "
                        "gigabyte each; TORCHINDUCTOR_COMPILE_THREADS=1 runs one",
                    ) from error
                if failed is not None:
                    raise rebuild(failed)
                progress(f"compiled {name}, {len(weights) - len(waiting) - len(running)} of {len(weights)}")


def _layout(weight: torch.Tensor) -> _Layout:
    return _Layout(shape=tuple(weight.shape), stride=weight.stride(), dtype=weight.dtype, device=str(weight.device))


def _make(name: str, layouts: Sequence[_Layout], directory: Path) -> dict[str, Any] | None:
    """In a process of the pool: make one package; returns the error, if there is one."""
    quiet_packages()
    try:
        make_package(REGIONS[name], [layout.tensor() for layout in layouts], directory)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is to say it
        if os.environ.get(DEBUG):
            traceback.print_exc()
        return describe(as_prewarm_error(error))
    return None


def make_package(region: Region, weights: Sequence[torch.Tensor], directory: Path) -> None:
    """Compile a region for the device and the dtype of `weights`; takes tens of seconds.

    Args:
        region: to compile.
        weights: of any instance of it: their shapes and dtypes count, their values do not.
        directory: where the package goes; made here.

    Raises:
        ModelError: the compiler failed.
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
            with _quiet_compiler(Path(scratch) / "log"):
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(archive), inductor_configs=_settings()
                )
        except Exception as error:
            if _is_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), scratch) from error
            raise ModelError(
                f"the region {region.name} cannot be compiled: {first_line(error)}",
                next_step="a C++ compiler (g++) is needed, and for a GPU CUDA's headers and libcuda.so (CUDA_HOME); "
                "or bake with --profile eager",
            ) from error
        _unpack(archive, directory)


def _settings() -> dict[str, Any]:
    """Of Inductor, for packages."""
    # As many threads as the process has been given, not as many as the bake had.
    settings = {"cpp.dynamic_threads": True}
    if hasattr(torch._inductor.config.aot_inductor, "precompile_headers"):
        # Torch 2.11 keeps compiled headers under a name in /tmp that others can foresee.
        settings["aot_inductor.precompile_headers"] = False
    return settings


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a file system is full; compilers say so in words."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _find_toolkit() -> None:
    """Let the compiler of packages find CUDA's headers in torch's own wheels, when no toolkit is installed."""
    installed = {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() or shutil.which("nvcc")
    if installed or Path("/usr/local/cuda/include/cuda.h").exists():
        return
    packages = Path(sysconfig.get_paths()["purelib"])
    for name in ("cuda_runtime", "cu13"):  # of CUDA 12's wheels, and of CUDA 13's
        if (packages / "nvidia" / name / "include" / "cuda.h").exists():
            os.environ["CUDA_HOME"] = str(packages / "nvidia" / name)
            break
    # NVIDIA's wheel of the runtime lacks the headers in `crt`, which its own include; Triton's brings them along.
    headers = packages / "triton" / "backends" / "nvidia" / "include"
    if headers.is_dir():
        os.environ.setdefault("CUDA_INC_PATH", str(headers))


def _find_driver(folder: Path, maps: str) -> None:
    """Let the linker find the driver's library that this process runs on, which may have no name without a version.

    Args:
        folder: for a link with that name.
        maps: of this process, as the kernel gives it in `/proc/self/maps`.
    """
    mapped = (line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6)
    for path in map(Path, mapped):
        if path.name.startswith("libcuda.so"):
            (folder / "libcuda.so").symlink_to(path)
            paths = (str(folder), *filter(None, [os.environ.get("LIBRARY_PATH")]))
            os.environ["LIBRARY_PATH"] = os.pathsep.join(paths)
            return


class _AsModule(torch.nn.Module):
    """What `torch.export` takes, around what a region is."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self._region = region

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._region.function(*arguments)


@contextlib.contextmanager
def _quiet_compiler(log: Path) -> Iterator[None]:
    """Keep a compiler's hundreds of remarks off the standard error of this process, unless it fails."""
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
    """For each argument which of its dimensions differ between calls, in the terms of `torch.export`."""
    lengths: dict[str, Any] = {}

    def dimension(size: Size) -> Any:
        length = lengths.setdefault(size.name, torch.export.Dim(size.name, min=size.least, max=size.most))
        if size.factor != 1:
            length = size.factor * length
        return length + size.offset if size.offset > 0 else length - -size.offset if size.offset else length

    inputs = ({place: dimension(size) for place, size in given.dynamic.items()} or None for given in region.inputs)
    return (*(None,) * weights, *inputs)


def _unpack(archive: Path, directory: Path) -> None:
    """Take the library and its kernels out of a `.pt2`."""
    directory.mkdir(parents=True)
    with zipfile.ZipFile(archive) as files:
        for name in files.namelist():
            path = PurePosixPath(name)
            target = LIBRARY if path.suffix == ".so" else path.name if path.suffix in _KERNELS else None
            if target is not None:
                with files.open(name) as source, (directory / target).open("xb") as out:
                    shutil.copyfileobj(source, out)
    if shutil.which("strip"):  # a sixth of a library is names that nobody looks up
        run_process(["strip", "--strip-unneeded", str(directory / LIBRARY)])
