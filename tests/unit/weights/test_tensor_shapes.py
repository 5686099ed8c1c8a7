"""Test the comparison of a checkpoint's tensors with those of its variant, on sparse files of full size."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.weights import tensor_shapes
from chatterbox_prewarm.weights.record import Synthetic
from chatterbox_prewarm.weights.tensor_shapes import check_tensors, expected_tensors
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Files = dict[str, dict[str, tuple[str, list[int]]]]

T3, S3GEN = "t3_cfg.safetensors", "s3gen.safetensors"
BYTES = {"F32": 4, "I64": 8, "BF16": 2, "F16": 2}
PUBLISHED = {"tfmr.layers": 30, "encoders": 6, "up_encoders": 4, "mid_blocks": 12, "encoder.blocks": 6}


def names(name: str) -> Iterator[str]:
    """Yield the names of a tensor in all layers of a published checkpoint."""
    stack, star, rest = name.partition(".*.")
    if not star:
        yield name
        return
    (count,) = (count for end, count in PUBLISHED.items() if stack.endswith(f".{end}") or stack == end)
    yield from (f"{stack}.{number}.{rest}" for number in range(count))


def write(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Write a file with the header of these tensors, and a hole instead of their data."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)


@pytest.fixture
def published(tmp_path: Path) -> Files:
    """Write the files of a complete checkpoint; return their tensors."""
    files = {
        ENGLISH.tensor_files[part]: {name: value for pattern, value in tensors.items() for name in names(pattern)}
        for part, tensors in expected_tensors(ENGLISH).items()
    }
    for file, tensors in files.items():
        write(tmp_path / file, tensors)
    return files


def test_a_complete_checkpoint_is_accepted(published: object, tmp_path: Path) -> None:
    assert published
    check_tensors(tmp_path, ENGLISH)


@pytest.mark.parametrize(
    ("file", "stack"), [(T3, "tfmr.layers.29."), (S3GEN, "flow.decoder.estimator.mid_blocks.11."), (T3, "speech_head")]
)
def test_a_checkpoint_without_its_last_layer_is_refused(
    published: Files, tmp_path: Path, file: str, stack: str
) -> None:
    write(tmp_path / file, {name: value for name, value in published[file].items() if not name.startswith(stack)})
    with pytest.raises(WeightsError, match=rf"{file} lacks \d+ tensor\(s\), the first: {stack}"):
        check_tensors(tmp_path, ENGLISH)


@pytest.mark.parametrize(
    ("file", "name", "size", "refused"),
    [
        (T3, "tfmr.layers.30.input_layernorm.weight", 1024, True),
        (T3, "x.tfmr.layers.4000000000.weight", 1, True),
        (S3GEN, "flow.encoder.encoders.6.norm_ff.weight", 512, True),
        (S3GEN, "x.mid_blocks.4000000000.y", 1, False),
        (S3GEN, "a.tensor.that.upstream.ignores", 1, False),
    ],
)
def test_unknown_tensors_are_refused_except_those_that_upstream_ignores(
    published: Files,
    tmp_path: Path,
    file: str,
    name: str,
    size: int,
    refused: bool,
) -> None:
    write(tmp_path / file, {**published[file], name: ("F32", [size])})
    if not refused:
        check_tensors(tmp_path, ENGLISH)
        return
    with pytest.raises(WeightsError, match=f"unknown tensor.*{name}"):
        check_tensors(tmp_path, ENGLISH)


def test_a_synthetic_checkpoint_has_the_layers_of_its_record(published: Files, tmp_path: Path) -> None:
    short = Synthetic(size="mini", seed=0, t3_layers=2, s3gen_blocks=2)
    with pytest.raises(WeightsError, match=r"unknown tensor.*tfmr\.layers\.10\."):
        check_tensors(tmp_path, ENGLISH, short)
    for file, tensors in published.items():
        kept = {
            name: value
            for name, value in tensors.items()
            if (match := tensor_shapes._STACKS.match(name)) is None or int(match[0].rstrip(".").rpartition(".")[2]) < 2
        }
        write(tmp_path / file, kept)
    check_tensors(tmp_path, ENGLISH, short)
