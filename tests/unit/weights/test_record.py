"""A checkpoint on disk: its record, its verification, and what is refused in place of safetensors."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.state.manifest import WeightsEntry
from chatterbox_prewarm.weights.record import Synthetic, check_quickly, read_record, record, verify
from chatterbox_prewarm.weights.safetensors_header import read_safetensors_header
from chatterbox_prewarm.weights.variants import ENGLISH, get_variant
from tests.helpers.states import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T3 = "t3_cfg.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Files with the names of the English model's, tiny, without a record."""
    return make_checkpoint(tmp_path / "weights")


@pytest.fixture
def recorded(checkpoint: Path) -> Path:
    record(checkpoint, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    return checkpoint


def write_zip_pickle(path: Path) -> None:
    """What `torch.save` writes: a zip archive around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": [1.0]}, protocol=2))
        archive.writestr("archive/data/0", bytes(64))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_record_names_origin_and_digests_and_is_read_back(checkpoint: Path) -> None:
    made = record(checkpoint, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    assert read_record(checkpoint) == made == verify(checkpoint)
    assert made.synthetic is None
    assert [entry.path for entry in made.files] == list(ENGLISH.files)
    for entry in made.files:
        content = (checkpoint / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert WeightsEntry.from_record(made).set_digest == made.set_digest
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*ENGLISH.files, "weights.json"])
    check_quickly(checkpoint, made)


def test_a_synthetic_checkpoint_says_so(checkpoint: Path) -> None:
    how = Synthetic(size="tiny", seed=3, t3_layers=2)
    record(checkpoint, variant=ENGLISH, repository="synthetic", revision="-", synthetic=how)
    assert verify(checkpoint).synthetic == how


def test_a_fine_tune_may_lack_the_builtin_voice_and_nothing_else(checkpoint: Path) -> None:
    (checkpoint / "conds.pt").unlink()
    made = record(checkpoint, variant=ENGLISH, repository="own", revision="-")
    assert "conds.pt" not in {entry.path for entry in made.files}
    assert verify(checkpoint) == made
    (checkpoint / "weights.json").unlink()
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        record(checkpoint, variant=ENGLISH, repository="own", revision="-")
    assert not (checkpoint / "weights.json").exists()


def test_the_set_digest_changes_with_any_file(recorded: Path) -> None:
    before = read_record(recorded)
    flip(recorded / "conds.pt")
    after = record(recorded, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    assert after.set_digest != before.set_digest


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "No such file"),
        (truncate, "is truncated: its header promises"),
        (lambda path: path.write_bytes(b""), "is not a safetensors file"),
        (lambda path: path.write_bytes(b"\x08\0\0"), "is not a safetensors file"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>"), "is not a safetensors file"),
        (write_zip_pickle, "is a pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"w": [1.0] * 99}, protocol=2)), "is a pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"w": [1.0] * 99}, protocol=4)), "is a pickle"),
        (flip, "sha256"),
    ],
)
def test_a_damaged_file_is_named_and_refused(recorded: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(recorded / T3)
    with pytest.raises(WeightsError, match=says) as caught:
        verify(recorded)
    assert T3 in caught.value.message
    assert caught.value.exit_code == 10
    assert caught.value.next_step


def test_every_differing_file_is_named(recorded: Path) -> None:
    flip(recorded / "conds.pt")
    (recorded / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"(?s)tokenizer\.json: 18 bytes expected, 2 found; conds\.pt: sha256"):
        verify(recorded)


def test_a_start_compares_sizes_and_the_digests_of_small_files(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_record(recorded)
    flip(recorded / T3)
    with pytest.raises(WeightsError, match=f"{T3}: sha256"):
        check_quickly(recorded, found)
    monkeypatch.setattr("chatterbox_prewarm.weights.record._SMALL", 0)
    check_quickly(recorded, found)  # of large ones, a start can afford the size alone
    flip(recorded / "conds.pt")
    with pytest.raises(WeightsError, match=r"conds\.pt: sha256"):
        check_quickly(recorded, found)  # but a pickle is compared whatever its size
    flip(recorded / "conds.pt")
    truncate(recorded / T3)
    with pytest.raises(WeightsError, match=rf"{T3} is truncated or was changed"):
        check_quickly(recorded, found)
    (recorded / T3).unlink()
    with pytest.raises(WeightsError, match=rf"{T3}: No such file") as caught:
        check_quickly(recorded, found)
    assert caught.value.exit_code == 10


def test_a_pickle_is_not_even_recorded(checkpoint: Path) -> None:
    write_zip_pickle(checkpoint / T3)
    with pytest.raises(WeightsError, match="loading one runs whatever code is in it"):
        record(checkpoint, variant=ENGLISH, repository="own", revision="-")
    assert not (checkpoint / "weights.json").exists()


def test_a_checkpoint_of_ones_own_without_a_record_is_told_how_to_get_one(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no weights\.json") as caught:
        verify(checkpoint)
    assert f"weights record {checkpoint}" in caught.value.next_step
    assert caught.value.exit_code == 10


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no weights directory") as caught:
        verify(tmp_path / "nowhere")
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(schema=2), "is of schema 2; this version reads 1"),
        (lambda raw: raw.pop("schema"), "cannot be read"),
        (lambda raw: raw.pop("files"), "cannot be read"),
        (lambda raw: raw.update(surplus=1), "cannot be read"),
        (lambda raw: raw.update(files=[{"path": "x"}]), "cannot be read"),
        (lambda raw: raw.update(synthetic="yes"), "cannot be read"),
        (lambda raw: raw.update(variant="klingon"), "is of the variant 'klingon'; this version knows english"),
    ],
)
def test_a_record_of_another_form_is_refused(
    recorded: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = recorded / "weights.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(WeightsError, match=says) as caught:
        read_record(recorded)
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("content", [b"", b"{half", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_record_that_is_no_json_object_is_refused(recorded: Path, content: bytes) -> None:
    (recorded / "weights.json").write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_record(recorded)


def test_a_header_gives_dtypes_and_shapes(checkpoint: Path) -> None:
    assert read_safetensors_header(checkpoint / T3) == {"w": ("F32", (2, 3)), "n": ("I64", (4,))}


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
def test_a_header_of_another_form_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        read_safetensors_header(path)


def test_an_unknown_variant_is_bad_input() -> None:
    assert get_variant("english") is ENGLISH
    with pytest.raises(BadInputError, match="no model variant 'klingon'") as caught:
        get_variant("klingon")
    assert "english" in caught.value.next_step
