"""Checks of external input: texts and names of voices. This module does not import torch."""

from __future__ import annotations

import re
import reprlib

from chatterbox_prewarm.errors import BadInputError

#: Default limit of a request's text, as in OpenAI's API. The model accepts less in one call (2046 text tokens, at most
#: about one per character); the server splits longer texts.
MAX_CHARACTERS = 4096
#: The complete name of a voice must match this regular expression.
VOICE_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
#: Control characters that are white space, such as the form feed that pdftotext writes between pages.
_SPACES = re.compile("[\v\f\x1c-\x1f\x85]")
#: All other control characters, and surrogates.
_REFUSED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
#: Characters without a glyph: soft hyphens, zero-width characters, byte order marks, and marks that select another
#: glyph. The tokenizer's vocabulary lacks them, so a word with such a character would be spoken wrongly. These are
#: Unicode's Default_Ignorable_Code_Point and the marks of interlinear annotations.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def check_text(text: object, *, limit: int | None = MAX_CHARACTERS) -> str:
    """Return `text` in the form in which it can be spoken.

    Invisible characters are removed, and control characters that are white space become spaces.

    Args:
        text: the text as the user gave it.
        limit: the maximum number of characters in the returned text; None: no limit.

    Raises:
        BadInputError: `text` is not a string, is empty, is longer than `limit`, or contains other control characters
            or surrogates.
    """
    if not isinstance(text, str):
        raise BadInputError(f"the text is {type(text).__name__}, not a string", next_step="send a string")
    text = _SPACES.sub(" ", _INVISIBLE.sub("", text))
    if not text or text.isspace():
        raise BadInputError("the text is empty", next_step="send at least one word")
    if limit is not None and len(text) > limit:
        raise BadInputError(
            f"the text has {len(text)} characters, more than the limit of {limit}",
            next_step="split it at sentences and send the parts separately",
        )
    if found := _REFUSED.search(text):
        raise BadInputError(
            f"the text contains the control character or lone surrogate U+{ord(found[0]):04X}",
            next_step="remove it; the text must be valid UTF-8 without control characters",
        )
    return text


#: What `normalize_punctuation` replaces for most models, in this order.
_PUNCTUATION = (
    ("...", ", "),
    ("…", ", "),
    (":", ","),
    (" - ", ", "),
    (";", ", "),
    ("—", "-"),
    ("\N{EN DASH}", "-"),
    (" ,", ","),
    ("“", '"'),
    ("”", '"'),
    ("\N{LEFT SINGLE QUOTATION MARK}", "'"),
    ("\N{RIGHT SINGLE QUOTATION MARK}", "'"),
)
SENTENCE_ENDS = (".", "!", "?", "-", ",")


def normalize_punctuation(
    text: str,
    *,
    ends: tuple[str, ...] = SENTENCE_ENDS,
    replaced: tuple[tuple[str, str], ...] = _PUNCTUATION,
) -> str:
    """Return a text in the form that the model was trained on, as upstream's `punc_norm` does.

    The first letter becomes upper case, white space becomes single spaces, rare punctuation is `replaced`, and a full
    stop is added if the text has no end of a sentence, which is one of `ends`.

    Example:
        >>> normalize_punctuation("wait…  what")
        'Wait, what.'
    """
    if text[:1].islower():
        text = text[0].upper() + text[1:]
    text = " ".join(text.split())
    for old, new in replaced:
        text = text.replace(old, new)
    text = text.rstrip(" ")
    return text if text.endswith(ends) else f"{text}."


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
