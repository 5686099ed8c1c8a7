"""Stand-ins for T3 and its tokenizer in a model that only converts speech, which saves two thirds of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.tokenizer import TextFrame

if TYPE_CHECKING:
    import torch

    from chatterbox_prewarm.model.conditionals import T3Conditionals
    from chatterbox_prewarm.model.regions.decoder import TokenDecoder
    from chatterbox_prewarm.model.variants import TextFrontEnd


class _NoText:
    """A front end that no text reaches."""

    frame = TextFrame(start=(), stop=(), limit=0)
    tags: tuple[str, ...] = ()

    def load(self) -> None:
        """Do nothing: there is no data to read."""

    def check(self, text: str, language: str) -> None:  # noqa: ARG002 - see `TextFrontEnd`
        """Refuse a text.

        Raises:
            BadInputError: always.
        """
        raise BadInputError(
            "this model converts speech, and speaks no texts", next_step="load the model without `converts`"
        )

    def ids(self, text: str, language: str) -> list[int]:  # noqa: ARG002 - see `TextFrontEnd`
        """Return no tokens, for the check of a start."""
        return []


class _NoDecoder:
    """A decoder that draws no tokens."""

    prepares_voices = False

    def check(self, conditionals: T3Conditionals, text_tokens: torch.Tensor) -> None:
        """Do nothing in the check of a start."""

    def prefix_usage(self) -> dict[str, int]:
        """Return nothing: no voice has keys and values."""
        return {}


def no_text() -> TextFrontEnd:
    """Return a front end for a model that speaks no texts."""
    return cast("TextFrontEnd", _NoText())


def no_decoder() -> TokenDecoder:
    """Return a decoder for a model that speaks no texts."""
    return cast("TokenDecoder", _NoDecoder())
