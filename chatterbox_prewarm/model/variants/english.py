"""The English model."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.text import normalize_punctuation
from chatterbox_prewarm.model.tokenizer import LLAMA_FRAME, character_tokenizer, check_known, encode, read_tokenizer
from chatterbox_prewarm.model.upstream_source import Behaviour, loader_parameters
from chatterbox_prewarm.model.variants import llama

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from tokenizers import Tokenizer

    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
    from chatterbox_prewarm.model.regions.t3 import T3Decoder
    from chatterbox_prewarm.weights.variants import Variant


#: See `VariantCode`.
GREEDY = llama.GREEDY
t3_config, s3gen_arguments = llama.t3_config, llama.s3gen_arguments
upstream_speech_tokens, limit_upstream = llama.upstream_speech_tokens, llama.limit_upstream


class EnglishText:
    """Turns English text into text tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.frame = LLAMA_FRAME
        self.tags: tuple[str, ...] = ()

    def check(self, text: str, language: str) -> None:  # noqa: ARG002 - there is only one language
        """Check that the tokenizer knows at least half of a text; see `check_known`."""
        check_known(self.tokenizer, text, step="send a text in a language of the model; this one speaks English")

    def load(self) -> None:
        """Do nothing: English needs no data."""

    def ids(self, text: str, language: str) -> list[int]:  # noqa: ARG002 - there is only one language
        """Return the text tokens of a checked text."""
        return encode(self.tokenizer, normalize_punctuation(text))


def read_text(directory: Path, variant: Variant, plain: frozenset[str] = frozenset()) -> EnglishText:  # noqa: ARG001
    """Read the tokenizer of a checkpoint; see `VariantCode`."""
    return EnglishText(read_tokenizer(directory / variant.tokenizer))


def behaviour(variant: Variant) -> Behaviour:  # noqa: ARG001 - see `VariantCode`
    """Return what upstream does."""
    return Behaviour(repetition_penalty=1.2)


def aligned_heads(variant: Variant, layers: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG001 - see `VariantCode`
    """Return no heads: upstream analyzes the alignment of the Multilingual model only."""
    return ()


def decoder(
    variant: Variant,  # noqa: ARG001 - see `VariantCode`
    weights: NamedTensors,
    executor: Executor,
    *,
    dtype: torch.dtype | None,
    graphs: bool,
) -> T3Decoder:
    """Make the decoder of speech tokens."""
    from chatterbox_prewarm.model.regions.t3 import T3Decoder

    return T3Decoder(weights, executor, dtype=dtype, graphs=graphs)


def upstream_class() -> Any:
    """Import upstream's class."""
    from chatterbox.tts import ChatterboxTTS

    return ChatterboxTTS


def is_upstream(model: Any, variant: Variant) -> bool:  # noqa: ARG001 - see `VariantCode`
    """Return whether a model of upstream is this variant."""
    return isinstance(model, upstream_class())


def upstream_tokenizer(directory: Path, variant: Variant) -> Any:
    """Construct upstream's tokenizer."""
    from chatterbox.models.tokenizers import EnTokenizer

    return EnTokenizer(str(directory / variant.tokenizer))


def upstream_loads(variant: Variant) -> bool:  # noqa: ARG001 - see `VariantCode`
    """Return whether upstream is installed."""
    return bool(loader_parameters("tts"))


def upstream_from_local(directory: Path, variant: Variant, device: str) -> Any:  # noqa: ARG001 - see `VariantCode`
    """Load upstream's model with upstream's code."""
    return upstream_class().from_local(directory, device)


def upstream_generate(model: Any, text: str, language: str) -> Any:  # noqa: ARG001 - there is only one language
    """Speak a text with upstream's `generate`."""
    return model.generate(text)


def upstream_text_ids(model: Any, text: str, language: str) -> list[int]:  # noqa: ARG001 - there is only one language
    """Return the text tokens that upstream computes."""
    from chatterbox.tts import punc_norm

    ids: list[int] = model.tokenizer.text_to_tokens(punc_norm(text))[0].tolist()
    return ids


def write_synthetic_text(directory: Path, variant: Variant) -> None:
    """Write a tokenizer of ASCII characters."""
    characters = string.ascii_letters + string.digits + string.punctuation
    text = character_tokenizer(characters, variant.text_vocabulary)
    (directory / variant.tokenizer).write_text(text, encoding="utf-8")
