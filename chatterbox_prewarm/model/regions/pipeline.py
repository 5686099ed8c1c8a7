"""A model with its regions bound: what a synthesis runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.t3 import SpeechTokens
from chatterbox_prewarm.model.regions.vocoder import Vocoder

if TYPE_CHECKING:
    import torch
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.regions.executors import Executor


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The three stages of a synthesis over one model's weights."""

    speech_tokens: SpeechTokens
    flow: Flow
    vocoder: Vocoder


_BOUND: WeakKeyDictionary[ChatterboxTTS, Bound] = WeakKeyDictionary()


def bind(
    model: ChatterboxTTS, executor: Executor, *, t3_dtype: torch.dtype | None = None, graphs: bool = False
) -> Bound:
    """Bind all regions to a model, for every synthesis with it from now on.

    Args:
        model: as upstream makes it; nothing of it is changed.
        executor: makes the regions.
        t3_dtype: of T3's transformer; None keeps the checkpoint's.
        graphs: capture T3's step as a CUDA graph.
    """
    _BOUND[model] = Bound(
        speech_tokens=SpeechTokens(model.t3, executor, dtype=t3_dtype, graphs=graphs),
        flow=Flow(model.s3gen.flow, executor),
        vocoder=Vocoder(model.s3gen, executor),
    )
    return _BOUND[model]


def bound(model: ChatterboxTTS) -> Bound:
    """The regions bound to a model, as they are written when nobody bound others.

    They hold the weights that the model had then: after a move or a load of others, `bind` anew.
    """
    return _BOUND.get(model) or bind(model, eager)
