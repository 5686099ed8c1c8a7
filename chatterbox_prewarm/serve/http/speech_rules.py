"""What a server accepts in a speech request."""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant


@dataclass(frozen=True, kw_only=True)
class SpeechRules:
    """What a server accepts in a speech request.

    Attributes:
        max_characters: the length of the longest text.
        ignore_speed: True to accept any value of the field `speed`, without an effect.
        variant: has the languages.
        language: of requests that name none; None chooses the variant's first language.
    """

    max_characters: int = MAX_CHARACTERS
    ignore_speed: bool = False
    variant: Variant = DEFAULT_VARIANT
    language: str | None = None
