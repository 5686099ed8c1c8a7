"""A long text in parts, each short enough to be spoken at once and long enough to be spoken well.

Where sentences end is found by sentencex, by the rules of English and the marks of other scripts: it knows
abbreviations, decimals and quotations, and leaves two sentences together where it is in doubt.
"""

from __future__ import annotations

import bisect
import re

#: About twenty seconds of speech, half of what the model can draw at once.
LIMIT = 280
#: Where a clause ends: Latin marks before a space only, since they also stand in numbers, and the end of a line.
_CLAUSE = r"""[,;:،؛–-]["'”’)\]]*(?=\s)|[，、；：—…][”’」』）]*|(?=\n)"""  # noqa: RUF001
#: The number of an item at the beginning of its line: a sentence to sentencex, and yet it belongs to what follows.
_ITEM = re.compile(r"\s*\(?\d{1,3}[.)]")


def split(text: str, *, limit: int = LIMIT) -> list[str]:
    """Cut a text into parts, in order, with all that is visible in it.

    A part is as many whole sentences as fit. A sentence that is too long by itself is cut after a clause, else at white
    space, else anywhere between two characters as a reader sees them, which may consist of several code points.

    Args:
        text: any; one within the limit comes back as it is.
        limit: most code points of a part.

    Returns:
        Parts without white space around them, none of them empty.
    """
    if len(text) <= limit:
        return [text]
    import regex

    seen = [match.end() for match in regex.finditer(r"\X", text)]
    between = set(seen)
    levels = [
        [end for end in ends if end in between]
        for ends in (
            _sentence_ends(text),
            [match.end() for match in regex.finditer(_CLAUSE, text)],
            [match.start() for match in regex.finditer(r"\s+", text)],
            seen,
        )
    ]
    parts = []
    start = _beginning(text, 0, between)
    while start < len(text):
        end = len(text)
        if len(text[start:].rstrip()) > limit:
            end = next((end for ends in levels if (end := _last(ends, start, start + limit))), start + limit)
        part = text[start:end].rstrip()
        if part:
            parts.append(part)
        start = _beginning(text, end, between)
    return parts


def _sentence_ends(text: str) -> list[int]:
    """Where sentences end, without the white space after them."""
    import sentencex

    ends, position = [], 0
    for sentence in sentencex.segment("en", text):
        stripped = sentence.strip()
        found = text.find(stripped, position)
        if stripped and found >= 0:
            position = found + len(stripped)
            line = text.rfind("\n", 0, position) + 1
            ends.append(len(text[:line].rstrip()) if _ITEM.fullmatch(text[line:position]) else position)
    return sorted(ends)


def _beginning(text: str, start: int, between: set[int]) -> int:
    """Where the next part begins: after white space, unless a mark combines with it."""
    position = start
    while position < len(text) and text[position].isspace():
        position += 1
    while position > start and position not in between and position < len(text):
        position -= 1
    return position


def _last(ends: list[int], start: int, most: int) -> int:
    """The last of `ends`, which ascend, beyond `start` and not beyond `most`; 0 if there is none."""
    index = bisect.bisect_right(ends, most)
    return ends[index - 1] if index and ends[index - 1] > start else 0
