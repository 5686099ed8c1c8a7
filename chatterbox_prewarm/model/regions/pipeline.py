"""The pipeline of a model: its T3 decoder, flow and vocoder, each with its regions bound to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.regions.vocoder import Vocoder

if TYPE_CHECKING:
    import torch
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.regions.executors import Executor


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The three stages of a synthesis with one model's weights."""

    decoder: T3Decoder
    flow: Flow
    vocoder: Vocoder


_PIPELINES: WeakKeyDictionary[ChatterboxTTS, Pipeline] = WeakKeyDictionary()


def bind_pipeline(
    model: ChatterboxTTS, executor: Executor, *, t3_dtype: torch.dtype | None = None, graphs: bool = False
) -> Pipeline:
    """Bind all regions to a model's weights. Every later synthesis with the model uses this pipeline.

    Args:
        model: upstream's model; it is not changed.
        executor: makes the regions callable.
        t3_dtype: of T3's transformer; None keeps the checkpoint's.
        graphs: capture T3's step as a CUDA graph.
    """
    _PIPELINES[model] = Pipeline(
        decoder=T3Decoder(model.t3, executor, dtype=t3_dtype, graphs=graphs),
        flow=Flow(model.s3gen.flow, executor),
        vocoder=Vocoder(model.s3gen, executor),
    )
    return _PIPELINES[model]


def is_bound(model: ChatterboxTTS) -> bool:
    """Return whether regions are bound to a model."""
    return model in _PIPELINES


def pipeline_of(model: ChatterboxTTS) -> Pipeline:
    """Return the pipeline bound to a model; bind one in eager mode if there is no pipeline yet.

    A pipeline keeps the weights that the model had when it was bound. Call `bind_pipeline` again after the model was
    moved to another device or has loaded other weights.
    """
    return _PIPELINES.get(model) or bind_pipeline(model, eager)
