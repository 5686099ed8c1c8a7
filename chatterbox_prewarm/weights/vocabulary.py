"""Check that a checkpoint's tokenizer and its T3 belong together."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.system.regular_files import read_regular
from chatterbox_prewarm.weights.safetensors_header import FETCH_AGAIN, read_safetensors_header

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.weights.variants import Variant

#: T3's embedding of text tokens, (tokens, width).
_EMBEDDING = "text_emb.weight"
#: What looks like a tag, such as "[laugh]".
TAG = re.compile(r"\[[A-Za-z][A-Za-z ]*\]")


def check_vocabulary(directory: Path, variant: Variant) -> None:
    """Check that T3 has an embedding for every token of the tokenizer.

    A token without one would fail only when a text uses it. Files without a vocabulary or an embedding are not judged:
    a load checks the names of all tensors.

    Raises:
        WeightsError: the tokenizer is not readable, or has a token without an embedding.
    """
    path, t3 = directory / variant.tokenizer, directory / variant.t3
    if not path.exists() or not t3.exists():
        return  # the record says which files are missing
    try:
        raw = json.loads(read_regular(path, follow_links=True))
        tokens = _tokens(raw)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} is not a tokenizer: {error!r}", next_step=FETCH_AGAIN) from error
    shapes = read_safetensors_header(t3)
    if not tokens or _EMBEDDING not in shapes:
        return
    word, number = max(tokens.items(), key=lambda token: token[1])
    rows = shapes[_EMBEDDING][1][0]
    if number >= rows:
        raise WeightsError(
            f"{path} has the token {word!r} with the number {number}, and T3 in {t3} has embeddings for "
            f"{rows} tokens (0 to {rows - 1})",
            next_step="use the tokenizer that this T3 was trained with",
        )


def _tokens(raw: Any) -> dict[str, int]:
    """Return the number of each token. Models such as Unigram list their tokens as pairs of text and score.

    GPT-2's file has only the numbers of the tokens.
    """
    if raw and all(isinstance(number, int) for number in raw.values()):
        return dict(raw)
    vocabulary = raw.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):
        vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in raw.get("added_tokens", [])}
    return {str(word): int(number) for word, number in {**vocabulary, **added}.items()}


def read_tags(directory: Path, variant: Variant) -> tuple[str, ...]:
    """Return what a text may contain to ask for a sound, in alphabetical order; empty for a variant without tags.

    Raises:
        WeightsError: the file of the tags cannot be read.
    """
    if not variant.tags:
        return ()
    path = directory / variant.tags
    try:
        return tuple(sorted(tag for tag in json.loads(read_regular(path, follow_links=True)) if TAG.fullmatch(tag)))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error!r}", next_step=FETCH_AGAIN) from error
