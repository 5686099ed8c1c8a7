"""The text files of a synthetic checkpoint of the Multilingual model."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.model.tokenizer import character_tokenizer

if TYPE_CHECKING:
    from chatterbox_prewarm.weights.variants import Variant

#: The letters of Cangjie codes, the digits that number characters with the same code, and the end of a code.
_CANGJIE_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789."
#: A few characters with their Cangjie codes. The last two share a code.
_SYNTHETIC_CANGJIE = {
    "我": "hqi",
    "你": "onf",
    "好": "vnd",
    "世": "pt",
    "界": "wll",
    "天": "mk",
    "今": "oin",
    "很": "hoav",
    "是": "amyo",
    "人": "o",
    "中": "l",
    "国": "wmgi",
    "说": "ivcru",
    "话": "ivhjr",
    "日": "a",
    "曰": "a",
}
#: Sentences that are split into words, from which the small model has its features.
_SYNTHETIC_WORDS = ("你好 , 世界 。", "今天 天 很 好 。", "我 是 中国 人 。", "我 说 话 。")
#: The first and the last character of each part of Unicode that the synthetic tokenizer knows, after NFKD.
_RANGES = (
    (" ", "~"),
    ("\u00a1", "\u00ff"),
    ("\u0111", "\u0153"),
    ("\u0300", "\u036f"),
    ("\u0384", "\u03ce"),
    ("\u0410", "\u045f"),
    ("\u05b0", "\u05ea"),
    ("\u060c", "\u0669"),
    ("\u0900", "\u097f"),
    ("\u1100", "\u1112"),
    ("\u1161", "\u1175"),
    ("\u11a8", "\u11c2"),
    ("\u3001", "\u3011"),
    ("\u3041", "\u30fe"),
)


def write(directory: Path, variant: Variant) -> None:
    """Write the files; see `multilingual.write_synthetic_text`."""
    special = [*(f"[{code}]" for code in variant.languages), *(f"[cj_{letter}]" for letter in _CANGJIE_LETTERS)]
    text = character_tokenizer(_characters(), variant.text_vocabulary, special=special)
    (directory / variant.tokenizer).write_text(text, encoding="utf-8")
    table = [f"{character}\t{code}" for character, code in _SYNTHETIC_CANGJIE.items()]
    (directory / variant.data[0]).write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    _write_synthetic_segmenter(directory, variant)


def _characters() -> list[str]:
    ranges = (map(chr, range(ord(first), ord(last) + 1)) for first, last in _RANGES)
    return [character for part in ranges for character in part if character != " "]


def _write_synthetic_segmenter(directory: Path, variant: Variant) -> None:
    """Write a model in pkuseg's format, with features from a few sentences and random weights."""
    import numpy as np
    from spacy_pkuseg.feature_extractor import FeatureExtractor  # type: ignore[import-untyped]
    from spacy_pkuseg.model import Model  # type: ignore[import-untyped]

    (archive,) = variant.archives
    path = directory / archive.path
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-words-") as scratch:
        corpus = Path(scratch) / "words.txt"
        corpus.write_text("\n".join(_SYNTHETIC_WORDS), encoding="utf-8")
        features = FeatureExtractor()
        with contextlib.redirect_stdout(io.StringIO()):
            features.build(str(corpus))
    features.save(str(folder))
    model = Model(len(features.feature_to_idx), len(features.tag_to_idx))
    model.w = np.random.default_rng(0).standard_normal(model.w.shape)
    model.save(str(folder))
    with zipfile.ZipFile(path, "w") as packed:
        for member in archive.members:
            packed.writestr(zipfile.ZipInfo(member), (folder / member).read_bytes())
