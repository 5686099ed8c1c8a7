"""Checks of what comes from outside: texts to speak, names of voices, and their bounds. Imports nothing heavy."""

from __future__ import annotations

import re
import reprlib
import unicodedata

from chatterbox_prewarm.errors import BadInputError

#: Default bound on a request's text, as in OpenAI's API. The model takes less at once (2046 text tokens, roughly one a
#: character or less); the server speaks it in parts.
MAX_CHARACTERS = 4096
#: What a name of a voice must match in whole.
VOICE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
_ALLOWED_CONTROLS = frozenset("\t\n\r")


def check_text(text: object, *, limit: int | None = MAX_CHARACTERS) -> str:
    """Return `text` if it can be spoken.

    Raises:
        BadInputError: it is no string, empty, longer than `limit` characters (None: any), or holds control characters.
    """
    if not isinstance(text, str):
        raise BadInputError(f"the text is {type(text).__name__}, not a string", next_step="send a string")
    # A text of nothing but white space and invisible format characters (category Cf) is empty too.
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in text):
        raise BadInputError("the text is empty", next_step="send at least one word")
    if limit is not None and len(text) > limit:
        raise BadInputError(
            f"the text has {len(text)} characters, more than the limit of {limit}",
            next_step="split it at sentences and send the parts one by one",
        )
    for character in text:
        category = unicodedata.category(character)
        if category in {"Cc", "Cs"} and character not in _ALLOWED_CONTROLS:
            raise BadInputError(
                f"the text holds the control character or lone surrogate U+{ord(character):04X}",
                next_step="remove it; the text must be valid UTF-8 without control characters",
            )
    return text


def decode_text(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        BadInputError: naming the position of the first bad byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"the text is not UTF-8: {error.reason} at byte {error.start}", next_step="encode it as UTF-8"
        ) from error


#: In the place of a voice's alias: every name that no voice has.
ANY = "*"


def check_voice_name(name: object) -> str:
    """Return `name` if it can name a voice, and so a file: letters, digits, `_` and `-`, at most 64.

    Raises:
        BadInputError: it cannot.
    """
    if not isinstance(name, str) or not re.fullmatch(VOICE_NAME, name):
        raise BadInputError(
            f"{reprlib.repr(name)} cannot name a voice",
            next_step="use 1 to 64 letters, digits, '_' and '-', beginning with a letter or digit",
        )
    return name
