"""Tokenizers of text: read one, check that it knows a text, and make one for a synthetic checkpoint."""

from __future__ import annotations

import collections
import json
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from chatterbox_prewarm.errors import BadInputError, WeightsError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: The tokens of upstream's vocabulary for a space and for an unknown character.
SPACE, _UNKNOWN = "[SPACE]", "[UNK]"


@dataclass(frozen=True, kw_only=True)
class TextFrame:
    """The tokens around the text of a prompt.

    Attributes:
        start, stop: before and after the text.
        limit: the most tokens of a text, without these.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    limit: int


#: Of upstream's `T3Config`: the start and the stop token, and the most text tokens with both.
MAX_TEXT_TOKENS = 2048
LLAMA_FRAME = TextFrame(start=(255,), stop=(0,), limit=MAX_TEXT_TOKENS - 2)
_START = LLAMA_FRAME.start[0]


def read_tokenizer(path: Path, *, needed: Iterable[str] = ()) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: of the file.
        needed: tokens that it must have, in addition to those that every text needs.

    Raises:
        WeightsError: it is damaged or lacks a token.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        missing = [token for token in ("[START]", "[STOP]", SPACE, *needed) if tokenizer.token_to_id(token) is None]
    except Exception as error:  # tokenizers raises Exception itself
        raise _tokenizer_error(path, first_line(error)) from error
    if missing:
        raise _tokenizer_error(path, f"it lacks the token {missing[0]}")
    return tokenizer


def _tokenizer_error(path: Path, cause: str) -> WeightsError:
    return WeightsError(
        f"{path} is not a tokenizer for this model: {cause}",
        next_step="use the tokenizer of the published checkpoint, or the one that this T3 was trained with",
    )


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, with upstream's token for a space."""
    ids: list[int] = tokenizer.encode(text.replace(" ", SPACE)).ids
    return ids


def check_known(tokenizer: Tokenizer, text: str, *, step: str) -> None:
    """Check that the tokenizer knows at least half of a text. The model speaks unknown tokens as noise.

    Args:
        tokenizer: the tokenizer of the model, which has a token for unknown characters.
        text: the text to speak.
        step: the next step in the error.

    Raises:
        BadInputError: more than half of the tokens, without spaces, are unknown.
    """
    marked = text.replace(" ", SPACE)
    encoding = tokenizer.encode(marked)
    spans = [span for token, span in zip(encoding.tokens, encoding.offsets, strict=True) if token == _UNKNOWN]
    count = len(encoding.tokens) - encoding.tokens.count(SPACE)
    if 2 * len(spans) > count:
        names = (unicodedata.name(character, "") for start, end in spans for character in marked[start:end])
        ((script, _), *_) = collections.Counter(name.partition(" ")[0] for name in names).most_common(1)
        raise BadInputError(
            f"the model does not know {len(spans)} of the {count} tokens of this text, mostly {script or 'unnamed'} "
            "characters",
            next_step=step,
        )


def check_script(text: str, script: str, *, step: str) -> None:
    """Check that at least half of the letters of a text belong to a script, for a tokenizer that knows all bytes.

    Args:
        text: the text to speak.
        script: the first word of Unicode's names of its letters, such as "LATIN".
        step: the next step in the error.

    Raises:
        BadInputError: more than half of the letters belong to other scripts.
    """
    scripts = collections.Counter(
        unicodedata.name(character, "unnamed").partition(" ")[0] for character in text if character.isalpha()
    )
    foreign = scripts.total() - scripts[script]
    if 2 * foreign > scripts.total():
        del scripts[script]
        ((name, _), *_) = scripts.most_common(1)
        raise BadInputError(
            f"the model was not trained with {foreign} of the letters of this text, mostly {name} characters",
            next_step=step,
        )


def character_tokenizer(characters: Iterable[str], size: int, *, special: Iterable[str] = ()) -> str:
    """Serialize a tokenizer of single characters, with upstream's special tokens at upstream's ids.

    Args:
        characters: its vocabulary.
        size: the number of its tokens. Ids without a character get a token that no text contains.
        special: tokens of several characters.

    Raises:
        ValueError: there are more tokens than `size`.
    """
    from tokenizers import models

    tokens = list(dict.fromkeys(["[STOP]", _UNKNOWN, SPACE, *special, *characters]))
    if len(tokens) >= size:
        raise ValueError(f"{len(tokens)} tokens and the start token, more than {size}")
    remaining = iter(tokens)
    ordered = ("[START]" if index == _START else next(remaining, f"[{index}]") for index in range(size))
    vocabulary = {token: index for index, token in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=_UNKNOWN))
    tokenizer.add_special_tokens(["[STOP]", _UNKNOWN, SPACE, "[START]", *special])
    return json.dumps(json.loads(tokenizer.to_str()), indent=1, sort_keys=True)
