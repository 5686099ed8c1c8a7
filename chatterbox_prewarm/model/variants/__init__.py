"""The variants: one module for each, with the code that only this variant needs.

`weights.variants` has the table with everything that is data. The rest of the project reaches the code through
`code_of`, and does not name a variant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from chatterbox_prewarm.model.upstream_source import Behaviour
    from chatterbox_prewarm.weights.variants import Variant


class TextFrontEnd(Protocol):
    """Turns the text of a request into text tokens."""

    tokenizer: Tokenizer

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
    """The functions of a variant's module."""

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

    def upstream_class(self) -> Any:
        """Import upstream's class of this variant."""

    def upstream_tokenizer(self, directory: Path, variant: Variant) -> Any:
        """Construct the tokenizer of upstream's class."""

    def upstream_from_local(self, directory: Path, variant: Variant, device: str) -> Any:
        """Load upstream's model from a checkpoint of this project with nothing but upstream's code."""

    def upstream_generate(self, model: Any, text: str, language: str) -> Any:
        """Speak a text with upstream's `generate` and its default settings: float32 (1, samples)."""

    def upstream_text_ids(self, model: Any, text: str, language: str) -> list[int]:
        """Return the text tokens that upstream's `generate` computes, without the start and the stop token."""

    def write_synthetic_text(self, directory: Path, variant: Variant) -> None:
        """Write the tokenizer of a synthetic checkpoint, and what else its texts need."""


def code_of(variant: Variant) -> VariantCode:
    """Return the module of a variant."""
    return cast("VariantCode", importlib.import_module(f"{__name__}.{variant.module}"))
