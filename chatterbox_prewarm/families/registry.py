"""The registry of cache families. Importing this module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.aot import AotFamily
from chatterbox_prewarm.families.bytecode import BytecodeFamily
from chatterbox_prewarm.families.conditionals import ConditionalsFamily
from chatterbox_prewarm.families.cuda import CudaFamily
from chatterbox_prewarm.families.inductor import InductorFamily
from chatterbox_prewarm.families.numba_cache import NumbaFamily
from chatterbox_prewarm.families.signal_constants import SignalFamily
from chatterbox_prewarm.families.triton_cache import TritonFamily
from chatterbox_prewarm.system.fingerprint import upstream_installed

if TYPE_CHECKING:
    from chatterbox_prewarm.families.base import Family

#: The bytecode family has a name because a bake asks it which modules a start imports.
BYTECODE = BytecodeFamily()
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        BYTECODE,
        NumbaFamily(),
        SignalFamily(),
        ConditionalsFamily(),
        AotFamily(),
        InductorFamily(),
        TritonFamily(),
        CudaFamily(),
    )
}
#: Families of compiled code. A bake fills them in a separate process, before anything else.
COMPILED = ("aot", "inductor", "triton")
#: Families that may be empty. If a GPU runs only code that was shipped for it, the driver compiles nothing.
MAY_BE_EMPTY = ("cuda",)


def applicable(profile: str, device: str, *, upstream: bool | None = None) -> tuple[str, ...]:
    """List the families that are used when a model runs with this profile on this device.

    Args:
        profile: of the start.
        device: of the start.
        upstream: whether upstream's model is installed; by default as here.
    """
    applying = (name for name, family in FAMILIES.items() if family.applies(profile, device))
    return tuple(name for name in applying if is_used(name, upstream=upstream))


def is_used(name: str, *, upstream: bool | None = None) -> bool:
    """Return False for a family that only upstream's code uses, where upstream is not installed."""
    family = FAMILIES.get(name)
    installed = upstream_installed() if upstream is None else upstream
    return family is None or not family.for_upstream or installed
