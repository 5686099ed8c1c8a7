"""The requests for audio that a server accepts."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.marks import check_marks
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant
from chatterbox_prewarm.weights.vocabulary import read_tags

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: Names that stand for the first model of a server: those of OpenAI's models, which many clients send by default, and
#: the project's name without a variant.
_FIRST = re.compile(r"(tts|gpt)-[\w.-]*|chatterbox", re.ASCII)


class UnknownModelError(BadInputError):
    """The server does not have a model."""


@dataclass(frozen=True, kw_only=True)
class SpeechRules:
    """The requests for audio that a server accepts.

    Attributes:
        max_characters: the length of the longest text.
        ignore_speed: True to accept any value of the field `speed`, without an effect.
        variants: the models. The first one speaks requests that name none.
        language: of requests that name none, if their model speaks it; None chooses the model's first language.
        plain_text: languages whose texts may lack the marks that their pronunciation needs.
        converts: True if a model converts speech.
        tags: what a text may contain to ask for a sound, by the name of the variant.
    """

    max_characters: int = MAX_CHARACTERS
    ignore_speed: bool = False
    variants: tuple[Variant, ...] = (DEFAULT_VARIANT,)
    language: str | None = None
    plain_text: tuple[str, ...] = ()
    converts: bool = False
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def for_variants(
        self, variants: Sequence[Variant], checkpoints: Mapping[str, Path] = MappingProxyType({})
    ) -> SpeechRules:
        """Return these rules for the models of a server, with their spelling of the languages, and their tags.

        Args:
            variants: of the models.
            checkpoints: the directory of each model's checkpoint by its variant, for the tags.

        Raises:
            BadInputError: no model speaks one of the languages.
            WeightsError: the tags cannot be read.
        """
        models = tuple(variants)
        language = None if self.language is None else _spelled(models, self.language)
        plain = tuple(_spelled(models, code) for code in self.plain_text)
        tags = {one.name: read_tags(checkpoints[one.name], one) for one in models if one.name in checkpoints}
        return replace(self, variants=models, language=language, plain_text=plain, tags=tags)

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of the sampling that a request for one of the models may have."""
        names = (name for variant in self.variants for name in (*variant.controls, *variant.ignored_controls))
        return tuple(dict.fromkeys(names))

    def model(self, name: str | None) -> Variant:
        """Return the model with the name that a request sends.

        Raises:
            UnknownModelError: the server does not have it.
        """
        if name is None or _FIRST.fullmatch(name):
            return self.variants[0]
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise UnknownModelError(
            f"there is no model {reprlib.repr(name)}: this server has {names}",
            next_step="send one of these names, or leave the field out",
        )

    def language_of(self, variant: Variant) -> str:
        """Return the language of requests to a model that name none."""
        return variant.check_language(self.language if self.language in variant.languages else None)

    def check_text(self, text: str, variant: Variant, language: str) -> str:
        """Return a complete text that has the marks of its language.

        The workers do not check that, because they see one part of a text at a time.

        Raises:
            BadInputError: it lacks them.
        """
        check_marks(text, variant.check_language(language), plain=self.plain_text)
        return text


def _spelled(variants: Sequence[Variant], code: str) -> str:
    """Return the code of a language as a variant spells it.

    Raises:
        BadInputError: no variant speaks it. The error names the languages of the variant with most of them.
    """
    if not any(code.lower() in variant.languages for variant in variants):
        max(variants, key=lambda variant: len(variant.languages)).check_language(code)
    return code.lower()
