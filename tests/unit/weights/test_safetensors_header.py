"""Test that headers of safetensors files are read, and that invalid ones are refused."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.weights.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from pathlib import Path


def test_a_header_gives_dtypes_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((2, 3), np.float32), "n": np.arange(4, dtype=np.int64)}, path)
    assert read_safetensors_header(path) == {"w": ("F32", (2, 3)), "n": ("I64", (4,))}


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    for padding in range(length - 160, length, 8):  # the writer pads to a multiple of 8
        save_file({"w": np.zeros(2, np.float32)}, path, metadata={"note": "x" * padding})
        if struct.unpack("<Q", path.read_bytes()[:8])[0] == length:
            break
    assert path.read_bytes()[:2] in {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
    assert list(load_file(path)) == ["w"]
    assert read_safetensors_header(path) == {"w": ("F32", (2,))}


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"w": 5}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, "x"]}}',
        b'{"w": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b'{"w": {"shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": \xff}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [], "data_offsets": [4, 8]}}',
        b'{"v": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "w": {"dtype": "U8", "data_offsets": [2, 4]}}',
        b'{"w": ' + b"[" * 100_000 + b"}",
    ],
)
def test_an_invalid_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        read_safetensors_header(path)


@pytest.mark.timeout(20)
def test_a_pipe_does_not_block_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="it is a pipe and not a regular file"):
        read_safetensors_header(tmp_path / "model.safetensors")
