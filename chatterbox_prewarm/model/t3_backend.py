"""A T3 that keeps its Hugging Face backend between calls.

Upstream's `T3.inference` begins with `self.compiled = False`, so every call builds a new backend. In the multilingual
model each build also registers three attention hooks that upstream never removes, and switches the attention to eager
permanently. This module does not change the installed package: `keep_backend` gives one T3 instance a subclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from chatterbox.models.t3 import T3

if TYPE_CHECKING:
    from torch import nn

#: The class whose hooks stay after a call. Upstream removed it after chatterbox-tts 0.1.7, so it is not imported.
_ANALYZER = "AlignmentStreamAnalyzer"


class PersistentT3(T3):  # type: ignore[misc]
    """T3 whose `compiled` cannot be reset once the backend exists.

    The multilingual variant builds a backend for each call, because its alignment analyzer belongs to one utterance.
    After each call this class removes the analyzer's changes from the transformer. The hooks that transformers
    registers once, to collect outputs, stay.
    """

    @property
    def compiled(self) -> bool:
        """Whether the next call can use an existing backend."""
        return not self.hp.is_multilingual and "patched_model" in self._modules

    @compiled.setter
    def compiled(self, value: bool) -> None:
        """Ignore upstream's reset: the backend depends only on the weights, which do not change."""

    @torch.inference_mode()
    def inference(self, **arguments: Any) -> torch.Tensor:
        """Sample speech tokens, with the arguments and the result of upstream's `T3.inference`.

        Returns:
            int64 (1, n), n <= max_new_tokens, including the stop token if it was sampled.
        """
        config = self.tfmr.config
        saved = (config._attn_implementation, config.output_attentions)
        try:
            tokens: torch.Tensor = super().inference(**arguments)
            return tokens
        finally:
            if self.hp.is_multilingual:
                _remove_analyzer_hooks(self.tfmr)
                config._attn_implementation, config.output_attentions = saved


def keep_backend(t3: T3) -> None:
    """Make `t3` keep its backend between calls of `inference`. A second call changes nothing."""
    if isinstance(t3, PersistentT3):
        return
    t3.__dict__.pop("compiled", None)  # the property takes precedence, so the instance attribute would become stale
    t3.__class__ = PersistentT3


def _remove_analyzer_hooks(transformer: nn.Module) -> None:
    """Remove the forward hooks of upstream's analyzer, which does not store their handles."""
    for layer in transformer.layers:  # type: ignore[union-attr]
        hooks = layer.self_attn._forward_hooks
        for key in [key for key, hook in hooks.items() if hook.__qualname__.startswith(_ANALYZER)]:
            del hooks[key]
