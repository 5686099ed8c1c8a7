"""Turbo and Nano: English models that were distilled from the first one, with tags for sounds.

T3 is a GPT-2 without guidance and without emotion, and S3Gen's flow needs two steps. The text tokens are those of
GPT-2, and the tags, such as "[laugh]", are tokens of their own.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from chatterbox_prewarm.errors import ModelError, WeightsError, first_line
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.text import normalize_punctuation
from chatterbox_prewarm.model.tokenizer import MAX_TEXT_TOKENS, TextFrame, check_script
from chatterbox_prewarm.model.upstream_source import Behaviour, loader_parameters
from chatterbox_prewarm.system.regular_files import read_regular
from chatterbox_prewarm.weights.safetensors_header import FETCH_AGAIN
from chatterbox_prewarm.weights.variants import TURBO
from chatterbox_prewarm.weights.vocabulary import TAG, read_tags

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.regions.gpt import GptDecoder
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
    from chatterbox_prewarm.weights.variants import Variant

logger = logging.getLogger(__name__)

#: What Turbo's `punc_norm` replaces, in this order.
_PUNCTUATION = (
    ("…", ", "),
    (":", ","),
    ("—", "-"),
    ("\N{EN DASH}", "-"),
    (" ,", ","),
    ("“", '"'),
    ("”", '"'),
    ("\N{LEFT SINGLE QUOTATION MARK}", "'"),
    ("\N{RIGHT SINGLE QUOTATION MARK}", "'"),
)
#: The token that upstream's `generate` appends three times: silence.
_SILENCE = (4299, 4299, 4299)
#: Upstream's names of the configurations of GPT-2, by the width.
_CONFIGURATIONS = {1024: "GPT2_medium", 768: "GPT2_small"}
#: Settings with which sampling always draws the most likely token.
GREEDY = Sampling(top_k=1)
#: A larger number means that the tokenizer's configuration states no limit.
_NO_LIMIT = 1 << 20


class TurboText:
    """Turns English text with tags into text tokens.

    Args:
        tokenizer: with the tags as added tokens.
        tags: the tags.
        limit: the number of tokens from which upstream's tokenizer would cut a text off.
    """

    def __init__(self, tokenizer: Tokenizer, tags: tuple[str, ...], limit: int) -> None:
        self.tokenizer = tokenizer
        self.frame = TextFrame(start=(), stop=(), limit=limit)
        self.tags = tags

    def check(self, text: str, language: str) -> None:  # noqa: ARG002 - there is only one language
        """Check that a text is in Latin script. An unknown tag is an ordinary text, as in upstream's model.

        Raises:
            BadInputError: most letters of the text belong to another script.
        """
        check_script(text, "LATIN", step="send a text in a language of the model; this one speaks English")
        if unknown := [tag for tag in TAG.findall(text) if tag not in self.tags]:
            logger.info("%d tag(s) in brackets are spoken as text: the model does not have them", len(unknown))

    def load(self) -> None:
        """Do nothing: English needs no data."""

    def ids(self, text: str, language: str) -> list[int]:  # noqa: ARG002 - there is only one language
        """Return the text tokens of a checked text."""
        ids: list[int] = self.tokenizer.encode(normalize_punctuation(text, replaced=_PUNCTUATION)).ids
        return ids


def read_text(directory: Path, variant: Variant, plain: frozenset[str] = frozenset()) -> TurboText:  # noqa: ARG001
    """Read the tokenizer of a checkpoint; see `VariantCode`."""
    merges, added, _, settings = (directory / name for name in variant.data)
    try:
        tags = _json(added)
        ordered = sorted(tags, key=tags.__getitem__)
        described = {entry["content"]: entry for entry in _json(settings).get("added_tokens_decoder", {}).values()}
        tokenizer = Tokenizer(models.BPE.from_file(str(directory / variant.tokenizer), str(merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
        tokenizer.add_tokens([_added(tag, described.get(tag, {})) for tag in ordered])
        numbers = {tag: tokenizer.token_to_id(tag) for tag in ordered}
        limit = int(_json(settings).get("model_max_length") or _NO_LIMIT)
    except Exception as error:  # tokenizers raises Exception itself
        raise WeightsError(
            f"the tokenizer in {directory} cannot be used: {first_line(error)}", next_step=FETCH_AGAIN
        ) from error
    if numbers != tags or max(tags.values(), default=0) >= variant.text_vocabulary:
        raise WeightsError(f"{added} does not continue the tokens of {variant.tokenizer}", next_step=FETCH_AGAIN)
    return TurboText(tokenizer, read_tags(directory, variant), limit if limit < _NO_LIMIT else MAX_TEXT_TOKENS)


def _json(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(read_regular(path, follow_links=True))
    return read


def _added(content: str, described: dict[str, Any]) -> AddedToken:
    """Describe an added token as the tokenizer's configuration does."""
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return AddedToken(content, **{name: described[name] for name in names if name in described})


def behaviour(variant: Variant) -> Behaviour:  # noqa: ARG001 - see `VariantCode`
    """Return what upstream does."""
    return Behaviour(repetition_penalty=1.2, silence=_SILENCE)


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
) -> GptDecoder:
    """Make the decoder of speech tokens."""
    from chatterbox_prewarm.model.regions.gpt import GptDecoder

    return GptDecoder(weights, executor, dtype=dtype, graphs=graphs)


def t3_config(variant: Variant) -> Any:
    """Return the configuration that upstream's `from_local` makes. The wheel lacks that of Nano's GPT-2."""
    from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
    from chatterbox.models.t3.modules.t3_config import T3Config

    width, heads = variant.t3_width, variant.t3_width // 64
    name = _CONFIGURATIONS[width]
    sizes = {"n_embd": width, "hidden_size": width, "n_head": heads, "n_layer": variant.t3_layers}
    LLAMA_CONFIGS.setdefault(name, {**LLAMA_CONFIGS[_CONFIGURATIONS[1024]], **sizes})
    config = T3Config(variant.text_vocabulary)
    config.llama_config_name = name
    config.speech_tokens_dict_size = 6563
    config.input_pos_emb = None
    config.speech_cond_prompt_len = variant.prompt_tokens
    config.use_perceiver_resampler = False
    config.emotion_adv = False
    return config


def s3gen_arguments() -> dict[str, Any]:
    """Return the arguments with which upstream constructs S3Gen."""
    return {"meanflow": True}


def upstream_speech_tokens(
    model: Any, conditionals: Any, text_ids: Sequence[int], *, sampling: Sampling, max_new_tokens: int
) -> torch.Tensor:
    """Draw speech tokens with upstream's T3; see `VariantCode`."""
    import torch

    tokens: torch.Tensor = model.t3.inference_turbo(
        conditionals,
        torch.tensor([list(text_ids)], device=model.device),
        temperature=sampling.temperature,
        top_k=int(sampling.top_k),
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        max_gen_len=max_new_tokens - 1,  # upstream draws one token more
    )
    return tokens[0]


def limit_upstream(model: Any, max_new_tokens: int) -> None:
    """Limit the speech tokens of upstream's `generate`; see `VariantCode`."""
    inference = model.t3.inference_turbo

    def limited(**arguments: Any) -> Any:
        return inference(**{**arguments, "max_gen_len": max_new_tokens - 1})

    model.t3.inference_turbo = limited


def upstream_class() -> Any:
    """Import upstream's class."""
    from chatterbox.tts_turbo import ChatterboxTurboTTS

    return ChatterboxTurboTTS


def is_upstream(model: Any, variant: Variant) -> bool:
    """Return whether a model of upstream is this variant."""
    return isinstance(model, upstream_class()) and model.t3.dim == variant.t3_width


def upstream_tokenizer(directory: Path, variant: Variant) -> Any:  # noqa: ARG001 - see `VariantCode`
    """Construct upstream's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def upstream_loads(variant: Variant) -> bool:
    """Return whether the installed upstream can load Turbo or Nano. Only its main branch loads Nano."""
    return ("ckpt_dir" if variant == TURBO else "nano") in loader_parameters("tts_turbo")


def upstream_from_local(directory: Path, variant: Variant, device: str) -> Any:
    """Load upstream's model with upstream's code; see `VariantCode`."""
    kind = upstream_class()
    if not upstream_loads(variant):
        raise ModelError(
            "the installed upstream cannot load Nano", next_step="install the main branch of resemble-ai/chatterbox"
        )
    return kind.from_local(directory, device, **({} if variant == TURBO else {"nano": True}))


def upstream_generate(model: Any, text: str, language: str) -> Any:  # noqa: ARG001 - there is only one language
    """Speak a text with upstream's `generate`."""
    return model.generate(text)


def upstream_text_ids(model: Any, text: str, language: str) -> list[int]:  # noqa: ARG001 - there is only one language
    """Return the text tokens that upstream computes."""
    from chatterbox.tts_turbo import punc_norm

    ids: list[int] = model.tokenizer(punc_norm(text), padding=True, truncation=True).input_ids
    return ids


def write_synthetic_text(directory: Path, variant: Variant) -> None:
    """Write a tokenizer of bytes with a few merges, and the published tags."""
    from chatterbox_prewarm.model.variants.turbo_synthetic import write

    write(directory, variant)
