"""Checks of external input: texts and names of voices. This module does not import torch."""

from __future__ import annotations

import re
import reprlib
import unicodedata

from chatterbox_prewarm.errors import BadInputError

#: Default limit of a request's text, as in OpenAI's API. The model accepts less in one call (2046 text tokens, at most
#: about one per character); the server splits longer texts.
MAX_CHARACTERS = 4096
#: The complete name of a voice must match this regular expression.
VOICE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_ALLOWED_CONTROLS = frozenset("\t\n\r")


def check_text(text: object, *, limit: int | None = MAX_CHARACTERS) -> str:
    """Return `text` if it can be spoken.

    Raises:
        BadInputError: `text` is not a string, is empty, is longer than `limit` characters (None: no limit), or contains
            control characters or surrogates.
    """
    if not isinstance(text, str):
        raise BadInputError(f"the text is {type(text).__name__}, not a string", next_step="send a string")
    # A text that contains only white space and invisible format characters (category Cf) is empty too.
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        raise BadInputError("the text is empty", next_step="send at least one word")
    if limit is not None and len(text) > limit:
        raise BadInputError(
            f"the text has {len(text)} characters, more than the limit of {limit}",
            next_step="split it at sentences and send the parts separately",
        )
    for character in text:
        category = unicodedata.category(character)
        if category in {"Cc", "Cs"} and character not in _ALLOWED_CONTROLS:
            raise BadInputError(
                f"the text contains the control character or lone surrogate U+{ord(character):04X}",
                next_step="remove it; the text must be valid UTF-8 without control characters",
            )
    return text


def decode_text(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        BadInputError: the data is not UTF-8. The message contains the position of the first invalid byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"the text is not UTF-8: {error.reason} at byte {error.start}", next_step="encode it as UTF-8"
        ) from error


#: An alias with this name replaces every requested name that has no voice and no other alias.
ANY = "*"


def is_voice_name(name: str) -> bool:
    """Return True if a voice and its file can have this name: at most 64 letters, digits, `_` and `-`."""
    return re.fullmatch(VOICE_NAME, name) is not None


def check_voice_name(name: object) -> str:
    """Return `name` if it is a valid name of a voice and of its file: at most 64 letters, digits, `_` and `-`.

    Raises:
        BadInputError: `name` is invalid.
    """
    if not isinstance(name, str) or not is_voice_name(name):
        raise BadInputError(
            f"{reprlib.repr(name)} cannot name a voice",
            next_step="use 1 to 64 letters, digits, '_' and '-', starting with a letter or digit",
        )
    return name
