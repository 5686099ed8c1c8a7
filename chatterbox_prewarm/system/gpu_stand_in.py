"""A stand-in for a GPU, with which a bake compiles for a GPU that the machine does not have.

torch, Inductor and Triton ask the driver for the properties of the GPU, and load and launch kernels when they tune
them. The stand-in is a library that answers in place of CUDA's libraries (`gpu_stand_in.cpp`). It is preloaded only in
the child processes of such a bake, so these run the same Python code as on a machine with the GPU.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.system.fingerprint import ABSENT
from chatterbox_prewarm.system.gpu_targets import architecture, find_target
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from chatterbox_prewarm.system.gpu_targets import GpuTarget

#: The series of torch that this was tried with, and the newest compute capability that its kernels run on.
_NEWEST_CAPABILITY = {"2.6": (9, 0), "2.11": (12, 0)}
#: The folder of CUDA 13's wheels. Its headers include one that is in a wheel that torch does not need.
_CUDA_13 = "cu13"
_SOURCE = Path(__file__).with_name("gpu_stand_in.cpp")
#: Set in processes that have a stand-in instead of a GPU: the name of the target.
_TARGET = "CHATTERBOX_PREWARM_STAND_IN"
#: Set in addition for a start: a copy from the device gives zeros. While compiling, it fails.
READS_ZEROS = {"CHATTERBOX_PREWARM_STAND_IN_READS": "zeros"}
#: The names under which programs load the driver and NVML.
_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")
#: A compiler for the code that calls the kernels. It leaves out what only the processor of this machine may have.
_COMPILER = """#!/bin/sh
for argument do
    shift
    [ "$argument" = -march=native ] || set -- "$@" "$argument"
done
exec {compiler} "$@"
"""


def stand_in_target() -> GpuTarget | None:
    """Return the target of this process, or None if it has no stand-in."""
    name = os.environ.get(_TARGET)
    return None if name is None else find_target(name)


def make_stand_in(target: GpuTarget, folder: Path) -> dict[str, str]:
    """Compile the stand-in for a target.

    Args:
        target: the GPU.
        folder: an empty folder, needed as long as processes use the stand-in. Compiled code contains its path.

    Returns:
        the environment variables for processes that should see the GPU.

    Raises:
        ModelError: there is no compiler, CUDA's headers are missing, or the installed torch cannot compile for the GPU.
        BadInputError: the path of the folder cannot be preloaded.
    """
    check_torch(target)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise ModelError(
            "compiling for a GPU needs a C++ compiler, but this machine has no program $CXX or g++",
            next_step="run: apt-get install g++",
        )
    if set(str(folder)) & set(" :"):
        raise BadInputError(
            f"{folder} cannot be preloaded, because its path has a space or a colon", next_step="use another --cache"
        )
    headers = cuda_headers()
    driver = folder / _LIBRARIES[0]
    macros = {
        "NAME": f'"{target.gpu or ABSENT}"',
        "MAJOR": target.capability[0],
        "MINOR": target.capability[1],
        "MULTIPROCESSORS": target.multiprocessors,
        "MEMORY": f"{target.memory}ull",
        "SHARED_MEMORY": target.shared_memory,
        "L2_CACHE": target.l2_cache,
        "THREADS": target.threads,
        "REGISTERS": target.registers,
    }
    compiled = run_process(
        [
            *(compiler, "-shared", "-fPIC", "-O1", "-std=c++17", f"-Wl,-soname,{driver.name}"),
            *(f"-I{path}" for path in headers),
            *(f"-DTARGET_{name}={value}" for name, value in macros.items()),
            *(str(_SOURCE), "-o", str(driver)),
        ]
    )
    if compiled.returncode != 0:
        raise ModelError("the stand-in for a GPU cannot be compiled", next_step="see the compiler's output above")
    (folder / _LIBRARIES[1]).symlink_to(driver.name)
    (folder / "libcuda.so").symlink_to(driver.name)
    (folder / "libcudart.so").symlink_to(next(headers[0].parent.glob("lib/libcudart.so.*")))
    wrapper = folder / Path(compiler).name  # Inductor recognizes compilers by their names
    wrapper.write_text(_COMPILER.format(compiler=shlex.quote(compiler)), encoding="utf-8")
    wrapper.chmod(0o755)
    return {
        _TARGET: target.name,
        # One GPU, whichever GPU of this machine the user selected. Its memory is not cached: it has no content.
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "LD_PRELOAD": _before("LD_PRELOAD", driver),
        "LD_LIBRARY_PATH": _before("LD_LIBRARY_PATH", folder),
        "LIBRARY_PATH": _before("LIBRARY_PATH", folder),
        "CPLUS_INCLUDE_PATH": _before("CPLUS_INCLUDE_PATH", *headers),
        "TRITON_LIBCUDA_PATH": str(folder),
        # For the same bytes in every bake: without paths of temporary files, and with one order of sets. Triton itself
        # compiles some kernels in one of two ways.
        "TRITON_DISABLE_LINE_INFO": "1",
        "PYTHONHASHSEED": "0",
        "CXX": str(wrapper),
    }


def _before(variable: str, *paths: Path) -> str:
    """Return the value of an environment variable that is a list of paths, with more paths in front."""
    return os.pathsep.join(filter(None, [*map(str, paths), os.environ.get(variable)]))


def check_torch(target: GpuTarget) -> None:
    """Refuse a torch for which this was never tried, or whose kernels do not run on the GPU.

    Raises:
        ModelError: see above.
    """
    installed = metadata.version("torch").partition("+")[0]
    newest = newest_capability(installed)
    if newest is None:
        raise ModelError(
            f"compiling without a GPU was tried with torch {' and '.join(_NEWEST_CAPABILITY)}, not with {installed}",
            next_step="use one of these versions, or bake on the GPU",
        )
    if target.capability > newest:
        raise ModelError(
            f"torch {installed} runs on GPUs up to {architecture(newest)}, and {target.name} is "
            f"{architecture(target.capability)}",
            next_step="use the stack torch-2.11 for newer GPUs",
        )


def newest_capability(torch: str) -> tuple[int, int] | None:
    """Return the newest compute capability that a version of torch has kernels for, or None if it was never tried."""
    return _NEWEST_CAPABILITY.get(".".join(torch.split(".")[:2]))


def cuda_headers() -> list[Path]:
    """Return the folders with the headers of the CUDA runtime and of the compiler, from the wheels that torch needs.

    Raises:
        ModelError: they are not installed.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    runtime = [packages / "nvidia" / name / "include" for name in ("cuda_runtime", _CUDA_13)]
    compiler = packages / "triton" / "backends" / "nvidia" / "include"
    found = [path for path in runtime if (path / "cuda_runtime_api.h").is_file()]
    if not found or not compiler.is_dir():
        raise ModelError(
            "the headers of CUDA are not installed", next_step="install torch for CUDA, which brings them, and Triton"
        )
    if found[0].parent.name == _CUDA_13 and not (found[0] / "nv" / "target").is_file():
        raise ModelError(
            "CUDA's header nv/target is not installed", next_step="run: pip install 'nvidia-cuda-cccl==13.0.*'"
        )
    return [found[0], compiler]
