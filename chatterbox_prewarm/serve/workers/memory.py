"""Refuse several models that do not fit into memory together, before any of them is loaded.

A single model is not checked: the kernel can drop pages of its mapped weights, so it runs in less memory, slowly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.fingerprint import free_gpu_memory
from chatterbox_prewarm.system.memory import usable_memory
from chatterbox_prewarm.weights.mapped import CONVERSION, SYNTHESIS, MappedWeights
from chatterbox_prewarm.weights.variants import get_variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig

#: Bytes of a worker process without the weights. On a CPU, each worker has 0.35 to 0.7 GB of private memory, and all
#: workers share 0.3 GB of libraries.
_WORKER_BYTES = 1 << 30
#: Bytes of a worker on its GPU without the weights: about 1 GiB for the CUDA context, and 1 GiB for the KV cache
#: (0.6 GiB for English in float32), the voices of Turbo (0.3 GiB), and what a synthesis allocates.
_GPU_BYTES = 2 << 30


def check_memory(configs: Sequence[WorkerConfig]) -> None:
    """Check that the models of a server fit into the memory of the machine and of each GPU.

    Raises:
        BadInputError: they do not fit.
        WeightsError, OSError: as `MappedWeights`.
    """
    sizes = [_tensor_sizes(config) for config in configs]
    # Files of two models may be hard links to one file, and all workers on the CPU share its pages. A worker on a GPU
    # copies the weights there, and the kernel may drop its pages.
    shared: dict[tuple[int, int, str], int] = {}
    for config, tensors in zip(configs, sizes, strict=True):
        if not config.device.startswith("cuda"):
            shared |= tensors
    _compare(sum(shared.values()) + len(configs) * _WORKER_BYTES, usable_memory(), "this container", configs)
    for device in dict.fromkeys(config.device for config in configs if config.device.startswith("cuda")):
        on_device = [config for config in configs if config.device == device]
        needed = sum(
            sum(tensors.values()) + _GPU_BYTES
            for config, tensors in zip(configs, sizes, strict=True)
            if config.device == device
        )
        free = free_gpu_memory(int(device.partition(":")[2] or 0))
        if free is not None:
            _compare(needed, free, f"the GPU {device}", on_device)


def _tensor_sizes(config: WorkerConfig) -> dict[tuple[int, int, str], int]:
    """Return the bytes of each tensor that a worker maps, by the device and the inode of its file, and its name."""
    sizes = {}
    parts = CONVERSION if config.start.converts else SYNTHESIS
    for file in MappedWeights(config.start.weights, get_variant(config.model), parts).files:
        status = file.path.stat()
        for name in file.used:
            sizes[status.st_dev, status.st_ino, name] = file.header.size_of(name)
    return sizes


def _compare(needed: int, available: int, place: str, configs: Sequence[WorkerConfig]) -> None:
    if needed <= available:
        return
    names = ", ".join(dict.fromkeys(config.pool for config in configs))
    raise BadInputError(
        f"the models {names} need {needed / 1e9:.1f} GB together, and {place} has {available / 1e9:.1f} GB",
        next_step="serve fewer of them with --variant, leave out --convert, use fewer devices, or give more memory",
    )
