"""The variants: one module for each, with the code that only this variant needs.

`weights.variants` has the table with everything that is data. The rest of the project reaches the code through
`code_of`, and does not name a variant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

from chatterbox_prewarm.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from tokenizers import Tokenizer

    from chatterbox_prewarm.model.regions.decoder import TokenDecoder
    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
    from chatterbox_prewarm.model.tokenizer import TextFrame
    from chatterbox_prewarm.model.upstream_source import Behaviour
    from chatterbox_prewarm.weights.variants import Variant


class TextFrontEnd(Protocol):
    """Turns the text of a request into text tokens.

    Attributes:
        tokenizer: of the checkpoint.
        frame: the tokens around a text, and its limit.
        tags: what a text may contain to ask for a sound, such as "[laugh]".
    """

    tokenizer: Tokenizer
    frame: TextFrame
    tags: tuple[str, ...]

    def check(self, text: str, language: str) -> None:
        """Check that the model can speak a text.

        Args:
            text: from `model.text.check_text`.
            language: a code of the variant's `languages`.

        Raises:
            BadInputError: it cannot.
        """

    def load(self) -> None:
        """Read the data of all languages, so that no request waits for it.

        Raises:
            WeightsError: data is missing or damaged.
            ModelError: a package is missing.
        """

    def ids(self, text: str, language: str) -> list[int]:
        """Return the text tokens of a checked text, without the start and the stop token."""


class VariantCode(Protocol):
    """The functions of a variant's module.

    Attributes:
        GREEDY: settings with which sampling always draws the most likely token.
    """

    GREEDY: Sampling

    def read_text(self, directory: Path, variant: Variant, plain: frozenset[str] = frozenset()) -> TextFrontEnd:
        """Read the tokenizer of a checkpoint, and what else its texts need.

        Args:
            directory: of the checkpoint.
            variant: has the names of the files.
            plain: languages whose texts may lack the marks that their pronunciation needs.

        Raises:
            WeightsError: a file is missing or damaged.
            ModelError: a package is missing.
        """

    def behaviour(self, variant: Variant) -> Behaviour:
        """Return the details in which this variant of the installed upstream differs from others."""

    def aligned_heads(self, variant: Variant, layers: int) -> tuple[tuple[int, int], ...]:
        """Return the attention heads of T3 that follow the text, as pairs of layer and head, for a T3 of `layers`.

        With such heads, `regions.alignment` decides when the speech must end and when it must not.
        """

    def decoder(
        self,
        variant: Variant,
        weights: NamedTensors,
        executor: Executor,
        *,
        dtype: torch.dtype | None,
        graphs: bool,
    ) -> TokenDecoder:
        """Make the decoder of speech tokens.

        Args:
            variant: what the model is.
            weights: of upstream's `T3`.
            executor: makes the regions callable.
            dtype: of the transformer; None keeps the checkpoint's.
            graphs: capture the step of a token as a CUDA graph.
        """

    def t3_config(self, variant: Variant) -> Any:
        """Return the configuration with which upstream constructs T3."""

    def s3gen_arguments(self) -> dict[str, Any]:
        """Return the arguments with which upstream constructs S3Gen."""

    def upstream_class(self) -> Any:
        """Import upstream's class of this variant."""

    def is_upstream(self, model: Any, variant: Variant) -> bool:
        """Return whether a model of upstream is this variant."""

    def upstream_tokenizer(self, directory: Path, variant: Variant) -> Any:
        """Construct the tokenizer of upstream's class."""

    def upstream_loads(self, variant: Variant) -> bool:
        """Return whether the code of the installed upstream can load this variant. Upstream is not imported for it."""

    def upstream_from_local(self, directory: Path, variant: Variant, device: str) -> Any:
        """Load upstream's model from a checkpoint of this project with nothing but upstream's code.

        Raises:
            ModelError: upstream cannot load this variant.
        """

    def upstream_generate(self, model: Any, text: str, language: str) -> Any:
        """Speak a text with upstream's `generate` and its default settings: float32 (1, samples)."""

    def upstream_speech_tokens(
        self, model: Any, conditionals: Any, text_ids: Sequence[int], *, sampling: Sampling, max_new_tokens: int
    ) -> torch.Tensor:
        """Draw speech tokens with upstream's T3.

        Args:
            model: upstream's model.
            conditionals: upstream's `T3Cond`, which this changes.
            text_ids: from `upstream_text_ids`.
            sampling: the sampling settings.
            max_new_tokens: the maximum number of tokens, because random weights never stop.

        Returns:
            int64 (n,).
        """

    def limit_upstream(self, model: Any, max_new_tokens: int) -> None:
        """Limit the speech tokens of `model.generate` from now on."""

    def upstream_text_ids(self, model: Any, text: str, language: str) -> list[int]:
        """Return the text tokens that upstream's `generate` computes, without the start and the stop token."""

    def write_synthetic_text(self, directory: Path, variant: Variant) -> None:
        """Write the tokenizer of a synthetic checkpoint, and what else its texts need."""


def code_of(variant: Variant) -> VariantCode:
    """Return the module of a variant."""
    return cast("VariantCode", importlib.import_module(f"{__name__}.{variant.module}"))


def default_sampling(variant: Variant) -> Sampling:
    """Return the sampling settings that upstream uses by default."""
    defaults = {name: control.default for name, control in variant.controls.items()}
    defaults["repetition_penalty"] = code_of(variant).behaviour(variant).repetition_penalty
    return Sampling(**defaults)  # type: ignore[arg-type]  # the exaggeration may be None, and top-k is an integer
