"""Test that a tokenizer with more tokens than T3 has embeddings is refused before a text uses them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.weights.record import check_quickly, read_record, record, verify
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.helpers.states import make_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 4


def checkpoint(directory: Path, tokenizer: Any) -> Path:
    """Make a checkpoint whose T3 has embeddings for four tokens."""
    make_checkpoint(directory)
    save_file({"text_emb.weight": np.zeros((ROWS, 2), np.float32)}, directory / "t3_cfg.safetensors")
    (directory / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer))
    return directory


def write_record(directory: Path) -> None:
    record(directory, variant=ENGLISH, repository="someone/voice", revision="a" * 40)


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "b": ROWS - 1}}, "added_tokens": [{"id": 1, "content": "[STOP]"}]},
        {"model": {"vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0], ["d", -4.0]]}},
        {"version": "1.0"},
    ],
)
def test_a_tokenizer_that_fits_is_accepted(tokenizer: Any, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "weights", tokenizer)
    write_record(directory)
    check_quickly(directory, verify(directory))


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": {"vocab": {"a": 0, "new": ROWS}}},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": ROWS, "content": "new"}]},
        {"model": {"vocab": [["a", -1.0], ["b", -2.0], ["c", -3.0], ["d", -4.0], ["new", -5.0]]}},
    ],
)
def test_a_token_without_an_embedding_is_named_at_record_at_verify_and_at_start(tokenizer: Any, tmp_path: Path) -> None:
    directory = checkpoint(tmp_path / "weights", {"version": "1.0"})
    write_record(directory)
    message = r"the token 'new' with the number 4, and T3 in .* has embeddings for 4 tokens \(0 to 3\)"
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WeightsError, match=message):
        write_record(directory)
    raw = json.loads((directory / "weights.json").read_text())
    entry = next(file for file in raw["files"] if file["path"] == "tokenizer.json")
    entry |= {
        "size": (directory / "tokenizer.json").stat().st_size,
        "sha256": hash_file(directory / "tokenizer.json"),
    }
    (directory / "weights.json").write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=message):
        verify(directory)
    with pytest.raises(WeightsError, match=message):
        check_quickly(directory, read_record(directory))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": {"vocab": {"a": "x"}}}', '{"added_tokens": [{}]}'])
def test_a_damaged_tokenizer_is_an_error_of_the_weights(text: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"tokenizer\.json is not a tokenizer"):
        write_record(checkpoint(tmp_path / "weights", text))
