"""Test that the tensors of a checkpoint are mapped into memory."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.weights.mapped import SPEECH_TOKENIZER, MappedWeights
from chatterbox_prewarm.weights.variants import ENGLISH

_ELEMENTS = 1 << 18  # a MiB of float32


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write the two files that a synthesis uses. Half of the second one is for voices from clips."""
    values = np.arange(_ELEMENTS, dtype=np.float32)
    save_file({"a": values, "b": np.arange(4, dtype=np.int64)}, tmp_path / "t3_cfg.safetensors")
    parts = {"flow.x": values, "mel2wav.y": values + 1, "speaker_encoder.z": values, "tokenizer.z": values}
    save_file({**parts, "flow.empty": np.zeros((0, 3), np.float32)}, tmp_path / "s3gen.safetensors")
    return tmp_path


def resident(file: Path) -> int:
    """Return how many bytes of a mapped file this process has mapped pages for."""
    text = Path("/proc/self/smaps").read_text()
    [region] = [region for region in text.split("VmFlags") if f" {file}\n" in region]
    return 1024 * int(next(line for line in region.splitlines() if line.startswith("Rss:")).split()[1])


def test_the_used_tensors_are_found_at_their_offsets(checkpoint: Path) -> None:
    t3, s3gen = MappedWeights(checkpoint, ENGLISH).files
    assert (t3.part, set(t3.used)) == ("t3", {"a", "b"})
    assert (s3gen.part, set(s3gen.used)) == ("s3gen", {"flow.x", "mel2wav.y"})
    found = np.frombuffer(s3gen.memory, np.float32, _ELEMENTS, s3gen.header.offsets["mel2wav.y"])
    assert np.array_equal(found, np.arange(_ELEMENTS, dtype=np.float32) + 1)
    assert s3gen.header.size_of("mel2wav.y") == 4 * _ELEMENTS


def test_the_speech_tokenizer_is_mapped_if_it_is_asked_for(checkpoint: Path) -> None:
    [s3gen] = MappedWeights(checkpoint, ENGLISH, SPEECH_TOKENIZER).files
    assert (s3gen.part, s3gen.used) == ("s3gen", ("tokenizer.z",))
    ((begin, end),) = s3gen.spans
    assert end - begin < 4 * _ELEMENTS + mmap.PAGESIZE


def test_populating_maps_the_pages_of_the_used_tensors_only(checkpoint: Path) -> None:
    mapped = MappedWeights(checkpoint, ENGLISH)
    file = checkpoint / "s3gen.safetensors"
    mapped.read_ahead()
    assert resident(file) < 1 << 20
    mapped.populate()
    assert 2 << 20 <= resident(file) < 3 << 20


def cached(file: Path, offset: int) -> bool:
    """Return whether the page cache has the page of a file at an offset."""
    with file.open("rb") as stream:
        try:
            return os.preadv(stream.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


def test_reading_ahead_fills_the_page_cache(checkpoint: Path) -> None:
    mapped = MappedWeights(checkpoint, ENGLISH)
    for file in mapped.files:
        with file.path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped.read_ahead()
    for file in mapped.files:
        deadline = time.monotonic() + 60  # the kernel reads in the background
        while not all(cached(file.path, offset) for span in file.spans for offset in range(*span, mmap.PAGESIZE)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_writing_to_a_mapped_file_does_not_change_it(checkpoint: Path) -> None:
    file = MappedWeights(checkpoint, ENGLISH).files[0]
    before = (checkpoint / "t3_cfg.safetensors").read_bytes()
    file.memory[file.header.offsets["a"]] = 255
    assert (checkpoint / "t3_cfg.safetensors").read_bytes() == before


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    with (checkpoint / "s3gen.safetensors").open("r+b") as stream:
        stream.truncate(1 << 20)
    with pytest.raises(WeightsError, match="truncated"):
        MappedWeights(checkpoint, ENGLISH)
