"""Marks that a text must have for its pronunciation: Hebrew points, and the stress of Russian words.

The Multilingual model was trained with them. Upstream has code that adds them, which never runs: it catches its own
error and speaks the text as it is. This module does not import torch.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Collection

#: The languages whose texts are checked.
MARKED = ("he", "ru")
_HEBREW_LETTER, _HEBREW_POINT = re.compile("[\u05d0-\u05ea]"), re.compile("[\u05b0-\u05bc\u05c1\u05c2\u05c7]")
#: A Russian word in NFKD, and its vowels. A word of one syllable needs no mark, and "ё" always has the stress.
_RUSSIAN_WORD, _RUSSIAN_VOWEL = re.compile("[\u0430-\u044f\u0301\u0306\u0308]+"), re.compile("[аеиоуыэюя]")
_STRESS, _DIAERESIS = "\N{COMBINING ACUTE ACCENT}", "\N{COMBINING DIAERESIS}"


def check_marks(text: str, language: str, *, plain: Collection[str] = ()) -> None:
    """Check that a complete text has the marks of its language. One mark is enough, because not every word needs one.

    Args:
        text: the text to speak.
        language: the code of its language.
        plain: languages whose texts may lack their marks.

    Raises:
        BadInputError: it has none and needs some.
    """
    if language not in MARKED or language in plain:
        return
    text = unicodedata.normalize("NFKD", text.lower())
    if language == "he":
        lacking = "Hebrew points (nikud)" if _HEBREW_LETTER.search(text) and not _HEBREW_POINT.search(text) else ""
    else:
        words = [word for word in _RUSSIAN_WORD.findall(text) if len(_RUSSIAN_VOWEL.findall(word)) > 1]
        marked = any(mark in word for word in words for mark in (_STRESS, _DIAERESIS))
        lacking = "stress marks (U+0301 after the stressed vowel)" if words and not marked else ""
    if lacking:
        raise BadInputError(
            f"the text has no {lacking}, so the model would guess its pronunciation",
            next_step=f"add them, or allow such texts with the option plain_text (--plain-text {language})",
        )
