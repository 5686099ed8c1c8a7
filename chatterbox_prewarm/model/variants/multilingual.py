"""The Multilingual model: 23 languages, with the T3 of the English model and its own text tokens.

A text is written in lower case and in Unicode's form NFKD, begins with the token of its language, and some languages
are rewritten: Chinese in Cangjie codes, Japanese in hiragana. Upstream loads the data for that over the network and
speaks a wrong text where it fails. Here the data are files of the checkpoint, and what is missing is an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, WeightsError, first_line
from chatterbox_prewarm.model.marks import check_marks
from chatterbox_prewarm.model.text import SENTENCE_ENDS, normalize_punctuation
from chatterbox_prewarm.model.tokenizer import LLAMA_FRAME, check_known, encode, read_tokenizer
from chatterbox_prewarm.model.upstream_source import (
    MAIN_BRANCH,
    Behaviour,
    installed_multilingual,
    loader_parameters,
)
from chatterbox_prewarm.model.variants import llama
from chatterbox_prewarm.system.regular_files import read_regular
from chatterbox_prewarm.weights.variants import MULTILINGUAL_V3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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

#: Upstream's `LLAMA_ALIGNED_HEADS`: the layer and the head.
_ALIGNED_HEADS = ((12, 15), (13, 11), (9, 2))
#: Packages that texts in Chinese and Japanese need.
_PACKAGES = ("spacy_pkuseg", "pykakasi")
_ENDS = (*SENTENCE_ENDS, "、", "，", "。", "？", "！")  # noqa: RUF001 - Chinese and Japanese punctuation


class MultilingualText:
    """Turns the text of a request into text tokens, in one of the languages.

    Args:
        tokenizer: of the checkpoint.
        directory: of the checkpoint.
        variant: has the names of the files.
        plain: languages whose texts may lack their marks: Hebrew its points, Russian its stress.
    """

    def __init__(self, tokenizer: Tokenizer, directory: Path, variant: Variant, plain: frozenset[str]) -> None:
        self.tokenizer = tokenizer
        self.frame = LLAMA_FRAME
        self.tags: tuple[str, ...] = ()
        self._directory, self._variant, self._plain = directory, variant, plain
        self._rewrite: Mapping[str, Callable[[str], str]] = {
            "zh": self._chinese,
            "ja": self._japanese,
            # Upstream also decomposes Korean syllables. The form NFKD has done that.
            "ko": str.strip,
        }

    def check(self, text: str, language: str) -> None:
        """Check that the tokenizer knows a text, and that it has the marks which its pronunciation needs.

        Raises:
            BadInputError: it does not, or lacks them.
        """
        check_marks(text, language, plain=self._plain)
        name = self._variant.languages[language]
        check_known(self.tokenizer, self._rewritten(text, language), step=f"send a text in {name}")

    def load(self) -> None:
        """Read the data of Chinese and Japanese, which otherwise happens with the first text."""
        self._chinese("好")
        self._japanese("今日")

    def ids(self, text: str, language: str) -> list[int]:
        """Return the text tokens of a checked text, beginning with the language's token."""
        return encode(self.tokenizer, f"[{language}]{self._rewritten(text, language)}")

    def _rewritten(self, text: str, language: str) -> str:
        normal = unicodedata.normalize("NFKD", normalize_punctuation(text, ends=_ENDS).lower())
        return self._rewrite.get(language, str)(normal)

    def _chinese(self, text: str) -> str:
        """Split a text into words, and write each character with a code as the tokens of its Cangjie code."""
        return "".join(
            self._cangjie_tokens.get(character, character) if unicodedata.category(character) == "Lo" else character
            for character in " ".join(self._segmenter.cut(text))
        )

    @functools.cached_property
    def _cangjie_tokens(self) -> dict[str, str]:
        """The tokens of each character. Characters with the same code are numbered, except the first one."""
        path = self._directory / self._variant.data[0]
        tokens: dict[str, str] = {}
        numbered: dict[str, list[str]] = {}
        try:
            for entry in json.loads(read_regular(path, follow_links=True)):
                character, code = entry.split("\t")[:2]
                same_code = numbered.setdefault(code, [])
                same_code.append(character)
                number = same_code.index(character)
                letters = f"{code}{number or ''}"
                tokens[character] = "".join(f"[cj_{letter}]" for letter in letters) + "[cj_.]"
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, repr(error)) from error
        if not tokens:
            raise _damaged(path, "it is empty")
        return tokens

    @functools.cached_property
    def _segmenter(self) -> Any:
        """The word segmenter that upstream uses, with the model in the checkpoint."""
        spacy_pkuseg = importlib.import_module("spacy_pkuseg")
        folder = self._directory / self._variant.archives[0].path.removesuffix(".zip")
        try:
            return spacy_pkuseg.pkuseg(str(folder))
        except Exception as error:  # it raises errors of msgpack, NumPy and its own assertions
            raise _damaged(folder, first_line(error)) from error

    def _japanese(self, text: str) -> str:
        """Write kanji as hiragana, with a space before a word that begins like a particle, as upstream does."""
        words = []
        for piece in self._kakasi.convert(text):
            reading = piece["hira"]
            if any("一" <= character <= "\u9fff" for character in piece["orig"]):
                words.append(f" {reading}" if reading.startswith(("は", "へ")) else reading)
            else:
                words.append(piece["orig"])
        return unicodedata.normalize("NFKD", "".join(words))

    @functools.cached_property
    def _kakasi(self) -> Any:
        return importlib.import_module("pykakasi").kakasi()


def _damaged(path: Path, cause: str) -> WeightsError:
    return WeightsError(
        f"{path} cannot be used: {cause}",
        next_step="fetch the checkpoint again with `chatterbox-prewarm weights fetch`",
    )


def read_text(directory: Path, variant: Variant, plain: frozenset[str] = frozenset()) -> MultilingualText:
    """Read the tokenizer of a checkpoint; see `VariantCode`. The data of a language is read when it is first used."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModelError(
                f"the package {name} is missing",
                next_step="install the multilingual extra: pip install 'chatterbox-prewarm[multilingual]'",
            )
    needed = [f"[{code}]" for code in variant.languages]
    return MultilingualText(read_tokenizer(directory / variant.tokenizer, needed=needed), directory, variant, plain)


def behaviour(variant: Variant) -> Behaviour:
    """Return the behaviour of the installed upstream, or of its main branch for T3 v3, which no other source loads."""
    return MAIN_BRANCH if variant == MULTILINGUAL_V3 else installed_multilingual()


def aligned_heads(variant: Variant, layers: int) -> tuple[tuple[int, int], ...]:
    """Return upstream's heads. In a shortened T3, its remaining layers take the places of the missing ones."""
    if not behaviour(variant).analyzes_alignment:
        return ()
    return tuple((layer % layers, head) for layer, head in _ALIGNED_HEADS)


def decoder(
    variant: Variant,
    weights: NamedTensors,
    executor: Executor,
    *,
    dtype: torch.dtype | None,
    graphs: bool,
) -> T3Decoder:
    """Make the decoder of speech tokens."""
    from chatterbox_prewarm.model.regions.t3 import T3Decoder

    aligned = aligned_heads(variant, len(weights.layers("tfmr.layers")))
    return T3Decoder(weights, executor, dtype=dtype, graphs=graphs, aligned=aligned)


def upstream_class() -> Any:
    """Import upstream's class."""
    from chatterbox.mtl_tts import ChatterboxMultilingualTTS

    return ChatterboxMultilingualTTS


def is_upstream(model: Any, variant: Variant) -> bool:  # noqa: ARG001 - see `VariantCode`
    """Return whether a model of upstream is this variant."""
    return isinstance(model, upstream_class())


def upstream_tokenizer(directory: Path, variant: Variant) -> Any:
    """Construct upstream's tokenizer with the data in the checkpoint, without the network."""
    from chatterbox.models.tokenizers import MTLTokenizer

    with _upstream_reads(directory, variant):
        return MTLTokenizer(str(directory / variant.tokenizer))


@contextlib.contextmanager
def _upstream_reads(directory: Path, variant: Variant) -> Iterator[None]:
    """Let upstream find the data of Chinese in the checkpoint instead of on the network."""
    from chatterbox.models.tokenizers import tokenizer as module

    config = importlib.import_module("spacy_pkuseg").config
    found = config.pkuseg_home, module.hf_hub_download
    config.pkuseg_home = str(directory / Path(variant.archives[0].path).parent)
    module.hf_hub_download = lambda *_, filename, **__: str(directory / filename)
    try:
        yield
    finally:
        config.pkuseg_home, module.hf_hub_download = found


def upstream_loads(variant: Variant) -> bool:
    """Return whether the installed upstream can load this T3. Only its main branch loads T3 v3."""
    return ("t3_model" if variant == MULTILINGUAL_V3 else "ckpt_dir") in loader_parameters("mtl_tts")


def upstream_from_local(directory: Path, variant: Variant, device: str) -> Any:
    """Load upstream's model with upstream's code, which reads pickles instead of the safetensors files."""
    import torch
    from safetensors.torch import load_file

    kind = upstream_class()
    chosen = {"t3_model": variant.t3} if "t3_model" in loader_parameters("mtl_tts") else {}
    if not upstream_loads(variant):
        raise ModelError(
            "the installed upstream cannot load T3 v3", next_step="install the main branch of resemble-ai/chatterbox"
        )
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-") as folder, _upstream_reads(directory, variant):
        for name in (variant.tokenizer, *variant.safetensors, variant.builtin_voice, *variant.data):
            if name in variant.published:
                torch.save(load_file(directory / name), Path(folder) / variant.published[name])
            elif (directory / name).exists():
                (Path(folder) / name).symlink_to((directory / name).resolve())
        return kind.from_local(folder, device, **chosen)


def upstream_generate(model: Any, text: str, language: str) -> Any:
    """Speak a text with upstream's `generate`."""
    return model.generate(text, language_id=language)


def upstream_text_ids(model: Any, text: str, language: str) -> list[int]:
    """Return the text tokens that upstream computes."""
    from chatterbox.mtl_tts import punc_norm

    ids: list[int] = model.tokenizer.text_to_tokens(punc_norm(text), language_id=language)[0].tolist()
    return ids


def write_synthetic_text(directory: Path, variant: Variant) -> None:
    """Write a tokenizer of characters, a table of a few Cangjie codes, and a small model that splits Chinese words."""
    from chatterbox_prewarm.model.variants.multilingual_synthetic import write

    write(directory, variant)
