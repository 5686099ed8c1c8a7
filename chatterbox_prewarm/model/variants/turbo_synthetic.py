"""The text files of a synthetic checkpoint of Turbo and Nano."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.weights.variants import Variant

#: The tags of the published tokenizer, in the order of their ids.
_TAGS = (
    *("[angry]", "[fear]", "[surprised]", "[whispering]", "[advertisement]", "[dramatic]", "[narration]"),
    *("[crying]", "[happy]", "[sarcastic]", "[clear throat]", "[sigh]", "[shush]", "[cough]", "[groan]"),
    *("[sniff]", "[gasp]", "[chuckle]", "[laugh]"),
)
_END = "<|endoftext|>"
#: A few merges of GPT-2. "Ġ" is a space.
_MERGES = ("Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "l l", "he ll", "hell o", "o r", "l d", "Ġ w", "Ġw or")
#: GPT-2's tokenizer has this limit, from which on it cuts a text off.
_MAX_TOKENS = 1024


def write(directory: Path, variant: Variant) -> None:
    """Write the files; see `turbo.write_synthetic_text`."""
    merges, added, special, settings = variant.data
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in _MERGES)]
    size = variant.text_vocabulary - len(_TAGS)
    words += [f"<{number}>" for number in range(len(words), size - 1)]
    _write(directory / variant.tokenizer, {word: number for number, word in enumerate([*words, _END])})
    (directory / merges).write_text("\n".join(("#version: 0.2", *_MERGES, "")), encoding="utf-8")
    _write(directory / added, {tag: size + number for number, tag in enumerate(_TAGS)})
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END)
    _write(directory / special, names)
    described = {
        str(size - 1 + number): _described(content, special=not number) for number, content in enumerate((_END, *_TAGS))
    }
    _write(
        directory / settings,
        {
            **names,
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": described,
            "errors": "replace",
            "model_max_length": _MAX_TOKENS,
            "tokenizer_class": "GPT2Tokenizer",
        },
    )


def _described(content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": not special, "special": special, **flags}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")
