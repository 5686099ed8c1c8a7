"""GPUs that a bake can compile for on a machine without one.

Sources: NVIDIA's data sheets (multiprocessors, memory, L2 cache) and the table "Technical Specifications per Compute
Capability" of the CUDA C++ programming guide 12.9 (shared memory, threads, registers).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.gpu_names import nvml_name

if TYPE_CHECKING:
    from collections.abc import Sequence

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
#: By compute capability: the most shared memory of a block in KiB, and the most threads of a multiprocessor.
_ARCHITECTURES = {
    (7, 5): (64, 1024),
    (8, 0): (163, 2048),
    (8, 6): (99, 1536),
    (8, 9): (99, 1536),
    (9, 0): (227, 2048),
    (10, 0): (227, 2048),
    (12, 0): (99, 1536),
}
#: The first compute capability with instructions for bfloat16. Inductor compiles no bfloat16 for older ones.
_BFLOAT16 = (8, 0)
#: Product name of NVML, compute capability, multiprocessors, memory in GiB, L2 cache in MiB. The first product of an
#: architecture represents it.
_PRODUCTS = (
    ("Tesla T4", (7, 5), 40, 16, 4),
    ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 40, 40),
    ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80, 40),
    ("NVIDIA A100 80GB PCIe", (8, 0), 108, 80, 40),
    ("NVIDIA A30", (8, 0), 56, 24, 24),
    ("NVIDIA A10", (8, 6), 72, 24, 6),
    ("NVIDIA A10G", (8, 6), 80, 24, 6),
    ("NVIDIA A40", (8, 6), 84, 48, 6),
    ("NVIDIA GeForce RTX 3090", (8, 6), 82, 24, 6),
    ("NVIDIA L4", (8, 9), 58, 24, 48),
    ("NVIDIA L40S", (8, 9), 142, 48, 96),
    ("NVIDIA GeForce RTX 4090", (8, 9), 128, 24, 72),
    ("NVIDIA H100 80GB HBM3", (9, 0), 132, 80, 50),
    ("NVIDIA H100 PCIe", (9, 0), 114, 80, 50),
    ("NVIDIA H200", (9, 0), 132, 141, 50),
    ("NVIDIA B200", (10, 0), 148, 180, 126),
    ("NVIDIA GeForce RTX 5090", (12, 0), 170, 32, 96),
)


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """A GPU to compile for.

    Attributes:
        gpu: the product name that NVML reports, or "" for every GPU with this compute capability. Then the other
            attributes are those of one such product.
        capability: the compute capability.
        memory, shared_memory, l2_cache: in bytes; the shared memory is the maximum of a block.
        threads: of a multiprocessor at most.
    """

    gpu: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    shared_memory: int
    l2_cache: int
    threads: int
    registers: int = 1 << 16

    @property
    def name(self) -> str:
        """The name with which `find_target` finds it: the product, or an architecture such as "sm_90"."""
        return self.gpu or architecture(self.capability)


def architecture(capability: tuple[int, int]) -> str:
    """Return the name that NVIDIA's compilers give to a compute capability, such as "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def find_target(text: str) -> GpuTarget:
    """Return the target for a product, as `nvml_name` accepts it, or for an architecture such as "sm_90".

    Raises:
        BadInputError: the name is unknown; the message names the nearest ones.
    """
    for product, capability, *_ in _PRODUCTS:
        if text.strip().lower() == architecture(capability):
            return _target("", product)
    if text.strip().lower().startswith("sm_"):
        known = ", ".join(map(architecture, _ARCHITECTURES))
        raise BadInputError(f"{text!r} is not an architecture that can be a target", next_step=f"choose from: {known}")
    name = nvml_name(text)
    products = [product for product, *_ in _PRODUCTS]
    if name not in products:
        near = difflib.get_close_matches(name, products, n=3, cutoff=0.3)
        raise BadInputError(
            f"the properties of {name} are not known, so nothing can be compiled for it without that GPU",
            next_step="name its architecture, such as sm_90"
            + (f"; or, if you meant that one: {' or '.join(near)}" if near else ""),
        )
    return _target(name, name)


def check_target(text: str, device: str, profile: str, t3_dtype: str) -> GpuTarget:
    """Return a target for a bake with this device, profile and data type.

    Raises:
        BadInputError: the target is unknown, or does not go with the device, the profile or the data type.
    """
    target = find_target(text)
    if device != "cuda":
        raise BadInputError(
            f"the target {target.name} is a GPU, and the device is {device!r}", next_step="use --device cuda"
        )
    if profile != "aot":
        raise BadInputError(
            f"the profile {profile!r} makes nothing that needs a target",
            next_step="use the profile aot for a target; or leave out --target, and bake on the GPU",
        )
    if t3_dtype == "bfloat16" and target.capability < _BFLOAT16:
        raise BadInputError(
            f"{target.name} cannot compute in bfloat16, which needs {architecture(_BFLOAT16)} or newer",
            next_step="use --t3-dtype float16 or float32",
        )
    return target


def check_targets(texts: Sequence[str], device: str, profile: str, t3_dtype: str) -> tuple[GpuTarget, ...]:
    """Return several targets for bakes with this device, profile and data type.

    Raises:
        BadInputError: a target is given twice, or `check_target` refuses it.
    """
    targets: dict[str, GpuTarget] = {}
    for text in texts:
        target = check_target(text, device, profile, t3_dtype)
        if target.name in targets:
            raise BadInputError(f"the target {target.name} is given twice", next_step="name each target once")
        targets[target.name] = target
    return tuple(targets.values())


def _target(gpu: str, product: str) -> GpuTarget:
    _, capability, multiprocessors, memory, l2_cache = next(row for row in _PRODUCTS if row[0] == product)
    shared_memory, threads = _ARCHITECTURES[capability]
    return GpuTarget(
        gpu=gpu,
        capability=capability,
        multiprocessors=multiprocessors,
        memory=memory * _GIB,
        shared_memory=shared_memory * _KIB,
        l2_cache=l2_cache * _MIB,
        threads=threads,
    )
