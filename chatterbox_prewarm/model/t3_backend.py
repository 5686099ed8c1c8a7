"""A T3 that keeps its Hugging Face backend between calls.

Upstream's `T3.inference` sets `self.compiled = False` first thing, so every call builds the backend anew; in the
multilingual model each of these builds also registers three attention hooks that nobody removes and switches
attention to eager for good. The installed package stays as it is: `keep_backend` gives one T3 instance a subclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer

if TYPE_CHECKING:
    from torch import nn


class PersistentT3(T3):  # type: ignore[misc]
    """T3 whose `compiled` cannot be reset once the backend stands.

    For the multilingual variant the backend is rebuilt for each call, since its alignment analyzer belongs to one
    utterance, but what the analyzer did to the transformer is undone afterwards. The hooks that transformers registers
    once, to collect outputs, stay.
    """

    @property
    def compiled(self) -> bool:
        """Whether a backend stands that the next call can use."""
        return not self.hp.is_multilingual and "patched_model" in self._modules

    @compiled.setter
    def compiled(self, value: bool) -> None:
        """Ignore upstream's bookkeeping: the backend depends on the weights alone, and those do not change."""

    @torch.inference_mode()
    def inference(self, **arguments: Any) -> torch.Tensor:
        """Sample speech tokens; arguments and result as upstream's `T3.inference`.

        Returns:
            int64 tensor of shape (1, n), n <= max_new_tokens, the stop token included when it was sampled.
        """
        config = self.tfmr.config
        saved = (config._attn_implementation, config.output_attentions)
        try:
            tokens: torch.Tensor = super().inference(**arguments)
            return tokens
        finally:
            if self.hp.is_multilingual:
                _remove_spies(self.tfmr)
                config._attn_implementation, config.output_attentions = saved


def keep_backend(t3: T3) -> None:
    """Make `t3` keep its backend between calls of `inference`; harmless when done twice."""
    if isinstance(t3, PersistentT3):
        return
    t3.__dict__.pop("compiled", None)  # an instance attribute would not hide the property, but would be stale
    t3.__class__ = PersistentT3


def _remove_spies(transformer: nn.Module) -> None:
    """Remove the forward hooks of upstream's analyzer, which keeps no handle to them."""
    owner = AlignmentStreamAnalyzer.__name__
    for layer in transformer.layers:  # type: ignore[union-attr]
        hooks = layer.self_attn._forward_hooks
        for key in [key for key, hook in hooks.items() if hook.__qualname__.startswith(owner)]:
            del hooks[key]
