"""Load upstream's model in a prepared process, with the part of the warm state that only upstream's code uses."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.registry import BYTECODE, FAMILIES
from chatterbox_prewarm.model.chatterbox_imports import require_upstream

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.start.prepare import Prepared


#: The phase in which upstream's model is loaded.
_LOAD = "upstream's model"


def is_upstream_attached(prepared: Prepared) -> bool:
    """Return whether `attach_upstream` has run in this start."""
    return any(phase["name"] == _LOAD for phase in prepared.metrics.phases)


def attach_upstream(prepared: Prepared, *, lean: Model | None = None) -> ChatterboxTTS:
    """Import upstream's packages and load upstream's model, which makes voices from clips.

    Args:
        prepared: the first step of the start of this process.
        lean: the model that this process runs. The result shares its tensors, and has it as its attribute `lean`.
            Without it, upstream's model is loaded onto the CPU.

    Raises:
        ModelError: upstream's packages are not installed.
        WeightsError, ModelError: as `model.upstream.load_upstream`.
    """
    require_upstream()
    metrics, options = prepared.metrics, prepared.options
    families = {
        name: family
        for name, family in FAMILIES.items()
        if family.for_upstream and family.applies(prepared.execution.profile, options.device)
    }
    BYTECODE.add_upstream_modules(prepared.folders.get(BYTECODE.name))
    with metrics.phase("import of upstream"):
        if not is_upstream_attached(prepared):  # a second time would count twice
            for family in families.values():
                family.watch(metrics)
        if prepared.execution.profile == "compiled":
            importlib.import_module("torch._dynamo")  # first, or the lean imports keep the compiler out
        from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox

        import_chatterbox()
        from chatterbox_prewarm.model.upstream import load_upstream
    device = lean.device if lean is not None else "cpu"
    with metrics.phase(_LOAD):
        model: Any = load_upstream(options.weights, device=device, lean=lean)
    model.lean = lean
    context = prepared.family_context({}, device=device)
    for name, family in families.items():
        family.attach(prepared.folders.get(name), context)
    return model
