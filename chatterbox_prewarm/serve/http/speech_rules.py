"""The speech requests that a server accepts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from chatterbox_prewarm.model.marks import check_marks
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant


@dataclass(frozen=True, kw_only=True)
class SpeechRules:
    """The speech requests that a server accepts.

    Attributes:
        max_characters: the length of the longest text.
        ignore_speed: True to accept any value of the field `speed`, without an effect.
        variant: has the languages.
        language: of requests that name none; None chooses the variant's first language.
        plain_text: languages whose texts may lack the marks that their pronunciation needs.
    """

    max_characters: int = MAX_CHARACTERS
    ignore_speed: bool = False
    variant: Variant = DEFAULT_VARIANT
    language: str | None = None
    plain_text: tuple[str, ...] = ()

    def for_variant(self, variant: Variant) -> SpeechRules:
        """Return these rules for the variant of a checkpoint, with its spelling of the languages.

        Raises:
            BadInputError: the variant does not speak one of the languages.
        """
        language = None if self.language is None else variant.check_language(self.language)
        plain = tuple(map(variant.check_language, self.plain_text))
        return replace(self, variant=variant, language=language, plain_text=plain)

    def check_text(self, text: str, language: str | None) -> str:
        """Return a complete text that has the marks of its language.

        The workers do not check that, because they see one part of a text at a time.

        Raises:
            BadInputError: it lacks them.
        """
        check_marks(text, self.variant.check_language(language), plain=self.plain_text)
        return text
