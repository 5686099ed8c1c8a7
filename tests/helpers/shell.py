"""Find the commands in shell code, without running them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class Command:
    """A simple command.

    Attributes:
        words: the program and its arguments, without redirections.
        line: the number of its first line.
        variables: the variables that are set for it.
        writes: the files to which its output is redirected.
    """

    words: list[str]
    line: int = 0
    variables: dict[str, str] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)


def fenced_blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number of the first line, the language and the content of each fenced block of a page."""
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            assert token.map is not None
            yield token.map[0] + 2, token.info.strip(), token.content


def split_commands(script: str, start: int = 1) -> Iterator[Command]:
    """Yield the commands of a script, in pipelines and in $( ), too. Comments and here-documents are left out.

    Args:
        script: the shell code, without loops and conditions.
        start: the number of its first line.

    Raises:
        ValueError: a command or a here-document has no end.
    """
    begun, first, end = "", start, ""
    for number, text in enumerate(script.splitlines(), start):
        if end:  # inside a here-document
            end = "" if text.strip() == end else end
            continue
        first = first if begun else number
        begun += text
        if begun.endswith("\\"):
            begun = f"{begun[:-1]} "
            continue
        tokens = _tokens(begun)
        if tokens is None:
            begun += "\n"
            continue
        begun = ""
        yield from _simple_commands(tokens, first)
        if "<<" in tokens:
            end = tokens[tokens.index("<<") + 1].removeprefix("-")
    if begun or end:
        raise ValueError(f"line {first}: the command or its here-document has no end")


def _tokens(text: str) -> list[str] | None:
    """Split shell code into words and operators, or return None if the next line continues it."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # an open quotation
        return None
    return None if tokens and tokens[-1] in {"|", "||", "&&"} else tokens


def _simple_commands(tokens: list[str], line: int) -> Iterator[Command]:
    words: list[str] = []
    variables: dict[str, str] = {}
    writes: list[str] = []
    rest = iter([*tokens, ";"])
    for token in rest:
        if re.fullmatch(r"&?>>?&?|<{1,3}", token):
            target = next(rest)
            writes += [target] if ">" in token else []
        elif re.fullmatch(r"[();<>|&]+", token):
            if words:
                yield Command(words=words, line=line, variables=variables, writes=writes)
            words, variables, writes = [], {}, []
        else:
            for script in re.findall(r"\$\((.*)\)", token, re.DOTALL):
                yield from split_commands(script, line)
            if not words and (assignment := re.fullmatch(r"(\w+)=(.*)", token, re.DOTALL)):
                variables[assignment[1]] = assignment[2]
            else:
                words.append(token)
