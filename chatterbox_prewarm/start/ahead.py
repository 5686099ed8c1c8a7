"""Work that a start does in threads while Python imports.

It is spent in the kernel, the dynamic linker or the GPU's driver, without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.fingerprint import has_nvml
from chatterbox_prewarm.system.metrics import now
from chatterbox_prewarm.system.paths import waiting_environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.system.metrics import StartMetrics

logger = logging.getLogger(__name__)


class Ahead:
    """A function that runs in a thread of its own.

    A start does not need its success: what fails here is done or reported later, where Python code needs it. A process
    that ends waits for it, because a library that is loaded at that moment would crash the process.

    Args:
        name: of the phase in the event log.
        work: the function.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._logged = False
        self._begin = self._end = now()
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def wait(self, metrics: StartMetrics) -> None:
        """Wait for the end, and add the phase to the event log of the first start that waits."""
        self._thread.join()
        if not self._logged:
            self._logged = True
            metrics.add_phase(self._name, self._begin, self._end)

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - see the docstring of the class
            logger.info("%s failed: %s", self._name, error)
        self._end = now()


@functools.cache
def torch_libraries() -> Ahead:
    """Load torch's libraries, once in a process. That is a third of the time of `import torch`.

    Python modules are not imported, so the settings of caches can still change. NVML comes first, because a start would
    otherwise wait until the linker has loaded torch's libraries.
    """
    has_nvml()
    os.environ.update(waiting_environment())  # read when the libraries are loaded
    return Ahead("torch's libraries", _load_torch_libraries)


def _load_torch_libraries() -> None:
    """Load the libraries in the order of `import torch`.

    Raises:
        OSError: torch is not installed, or a library cannot be loaded.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise OSError("torch is not installed")
    folder = Path(spec.origin).parent / "lib"
    process = ctypes.CDLL(None)  # a foreign function runs without the interpreter's lock, which `ctypes.CDLL` keeps
    process.dlopen.argtypes, process.dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    process.dlerror.restype = ctypes.c_char_p
    for name, flags in (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch.so", os.RTLD_LOCAL)):
        if not process.dlopen(os.fsencode(folder / name), os.RTLD_NOW | flags):
            raise OSError((process.dlerror() or b"").decode(errors="replace"))


def create_context(number: int) -> None:
    """Create the context of a GPU that torch will use, the primary one.

    Args:
        number: of the GPU, as in "cuda:0".

    Raises:
        OSError: there is no driver, or it has no such GPU.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for status in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), number),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
    ):
        if status:
            raise OSError(f"the driver returned {status}")
