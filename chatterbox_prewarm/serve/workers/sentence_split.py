"""Split a long text into parts: short enough for one synthesis, and long enough to sound natural.

The sentencex package finds the ends of sentences, with the rules of the language. It knows abbreviations, decimals and
quotations, and does not split where it is not sure.
"""

from __future__ import annotations

import bisect
import re

from chatterbox_prewarm.weights.vocabulary import TAG

#: Maximum number of characters in a part: about 20 s of speech. The model can speak twice as much at once.
LIMIT = 280
#: The same for languages that say more with a character. A part must fit into the 40 s that the model can speak.
_LIMITS = {"zh": 90, "ja": 110, "ko": 130}
#: The end of a clause. Latin punctuation counts only before white space, because numbers contain it too.
_CLAUSE = r"""[,;:،؛–-]["'”’)\]]*(?=\s)|[，、；：—…][”’」』）]*|(?=\n)"""  # noqa: RUF001
#: The number of a list item. sentencex takes it for a sentence, but it belongs to the text after it.
_ITEM_NUMBER = re.compile(r"\s*\(?\d{1,3}[.)]")


def split(text: str, language: str | None = None, *, limit: int | None = None) -> list[str]:
    """Split a text into parts that contain all its visible characters in order.

    A part contains as many sentences as the limit allows. A sentence that is longer than the limit is split after a
    clause, otherwise at white space, otherwise between two grapheme clusters (characters as a reader sees them, which
    may consist of several code points). A tag such as "[clear throat]" is never split, because the model would speak
    both halves as text.

    Args:
        text: any text. A text within the limit is returned unchanged.
        language: the code of its language; None is English.
        limit: maximum length of a part, in code points; by default that of the language.

    Returns:
        parts that are not empty, without white space at their ends.
    """
    limit = limit or _LIMITS.get(language or "", LIMIT)
    if len(text) <= limit:
        return [text]
    import regex

    cluster_ends = [match.end() for match in regex.finditer(r"\X", text)]
    allowed = set(cluster_ends) - _inside_tags(text, limit)
    candidates = [
        [end for end in ends if end in allowed]
        for ends in (
            _sentence_ends(text, language or "en"),
            [match.end() for match in regex.finditer(_CLAUSE, text)],
            [match.start() for match in regex.finditer(r"\s+", text)],
            cluster_ends,
        )
    ]
    parts = []
    start = _next_start(text, 0, allowed)
    while start < len(text):
        end = len(text)
        if len(text[start:].rstrip()) > limit:
            end = next((end for ends in candidates if (end := _last_end(ends, start, start + limit))), start + limit)
        part = text[start:end].rstrip()
        if part:
            parts.append(part)
        start = _next_start(text, end, allowed)
    return parts


def _sentence_ends(text: str, language: str) -> list[int]:
    """Return the positions where sentences end, without the white space after them."""
    import sentencex

    ends, position = [], 0
    for sentence in sentencex.segment(language, text):
        stripped = sentence.strip()
        index = text.find(stripped, position)
        if stripped and index >= 0:
            position = index + len(stripped)
            line = text.rfind("\n", 0, position) + 1
            is_item_number = _ITEM_NUMBER.fullmatch(text[line:position])
            ends.append(len(text[:line].rstrip()) if is_item_number else position)
    return sorted(ends)


def _inside_tags(text: str, limit: int) -> set[int]:
    """Return the positions inside the tags of a text, without their ends. A longer tag than the limit must be split."""
    tags = (match.span() for match in TAG.finditer(text))
    return {position for start, end in tags if end - start <= limit for position in range(start + 1, end)}


def _next_start(text: str, end: int, allowed: set[int]) -> int:
    """Return where the next part starts: after the white space, unless a mark combines with that white space."""
    position = end
    while position < len(text) and text[position].isspace():
        position += 1
    while position > end and position not in allowed and position < len(text):
        position -= 1
    return position


def _last_end(ends: list[int], start: int, limit: int) -> int:
    """Return the last of the ascending `ends` that is after `start` and not after `limit`; 0 if no such end exists."""
    index = bisect.bisect_right(ends, limit)
    return ends[index - 1] if index and ends[index - 1] > start else 0
