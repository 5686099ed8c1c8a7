"""Test that a checkpoint is recorded with its digests, and that damaged and unsafe files are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import re
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.state.manifest import WeightsEntry
from chatterbox_prewarm.weights import record as record_module
from chatterbox_prewarm.weights.record import Synthetic, check_quickly, read_record, record, verify
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL, get_variant
from tests.helpers.states import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T3 = "t3_cfg.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write tiny files with the names of the English checkpoint, without a record."""
    return make_checkpoint(tmp_path / "weights")


@pytest.fixture
def recorded(checkpoint: Path) -> Path:
    """Record the checkpoint."""
    record(checkpoint, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    return checkpoint


def write_zip_pickle(path: Path) -> None:
    """Write a zip archive with a pickle, as `torch.save` does."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": [1.0]}, protocol=2))
        archive.writestr("archive/data/0", bytes(64))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip_last_bit(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_record_holds_origin_and_digests_and_can_be_read(checkpoint: Path) -> None:
    written = record(checkpoint, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    assert read_record(checkpoint) == written == verify(checkpoint)
    assert written.synthetic is None
    assert [entry.path for entry in written.files] == list(ENGLISH.files)
    for entry in written.files:
        content = (checkpoint / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert WeightsEntry.from_record(written).set_digest == written.set_digest
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*ENGLISH.files, "weights.json"])
    check_quickly(checkpoint, written)


def test_the_record_of_a_synthetic_checkpoint_says_how_it_was_made(checkpoint: Path) -> None:
    synthetic = Synthetic(size="tiny", seed=3, t3_layers=2)
    record(checkpoint, variant=ENGLISH, repository="synthetic", revision="-", synthetic=synthetic)
    assert verify(checkpoint).synthetic == synthetic


def test_the_published_t3_of_a_variant_with_equal_shapes_is_recognized(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((checkpoint / T3).read_bytes()).hexdigest()
    other = dataclasses.replace(ENGLISH, name="other", t3="t3_other.safetensors", t3_sha256=digest)
    monkeypatch.setattr(record_module, "VARIANTS", {"english": ENGLISH, "other": other})
    with pytest.raises(WeightsError, match="is the T3 of the variant other, not of english") as caught:
        record(checkpoint, variant=ENGLISH, repository="own", revision="unversioned")
    assert "t3_other.safetensors" in (caught.value.next_step or "")
    assert not (checkpoint / "weights.json").exists()
    (checkpoint / T3).rename(checkpoint / other.t3)
    assert record(checkpoint, variant=other, repository="own", revision="unversioned").variant == "other"


def test_a_fine_tune_may_lack_only_the_builtin_voice(checkpoint: Path) -> None:
    (checkpoint / "conds.pt").unlink()
    written = record(checkpoint, variant=ENGLISH, repository="own", revision="-")
    assert "conds.pt" not in {entry.path for entry in written.files}
    assert verify(checkpoint) == written
    (checkpoint / "weights.json").unlink()
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        record(checkpoint, variant=ENGLISH, repository="own", revision="-")
    assert not (checkpoint / "weights.json").exists()


def test_the_set_digest_depends_on_every_file(recorded: Path) -> None:
    before = read_record(recorded)
    flip_last_bit(recorded / "conds.pt")
    after = record(recorded, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    assert after.set_digest != before.set_digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (truncate, "is truncated: its header requires"),
        (lambda path: path.write_bytes(b""), "is not a safetensors file"),
        (lambda path: path.write_bytes(b"\x08\0\0"), "is not a safetensors file"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>404</html>"), "is not a safetensors file"),
        (write_zip_pickle, "is a pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"w": [1.0] * 99}, protocol=2)), "is a pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"w": [1.0] * 99}, protocol=4)), "is a pickle"),
        (flip_last_bit, "sha256"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(
    recorded: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(recorded / T3)
    with pytest.raises(WeightsError, match=message) as caught:
        verify(recorded)
    assert T3 in caught.value.message
    assert caught.value.exit_code == 10
    assert caught.value.next_step


def test_every_file_that_differs_is_named(recorded: Path) -> None:
    flip_last_bit(recorded / "conds.pt")
    (recorded / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"(?s)tokenizer\.json: 18 bytes expected, 2 found; conds\.pt: sha256"):
        verify(recorded)


def test_the_quick_check_compares_all_sizes_and_the_digests_of_small_files(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_record(recorded)
    flip_last_bit(recorded / T3)
    with pytest.raises(WeightsError, match=f"{T3}: sha256"):
        check_quickly(recorded, expected)
    monkeypatch.setattr("chatterbox_prewarm.weights.record._SMALL", 0)
    check_quickly(recorded, expected)  # a start compares only the size of large tensor files
    flip_last_bit(recorded / "conds.pt")
    with pytest.raises(WeightsError, match=r"conds\.pt: sha256"):
        check_quickly(recorded, expected)  # a pickle of any size is compared
    flip_last_bit(recorded / "conds.pt")
    truncate(recorded / T3)
    with pytest.raises(WeightsError, match=rf"{T3} is truncated or was changed"):
        check_quickly(recorded, expected)
    (recorded / T3).unlink()
    with pytest.raises(WeightsError, match=rf"{T3}: No such file") as caught:
        check_quickly(recorded, expected)
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    "path",
    [
        "Cangjie5_TC.json",
        "pkuseg/spacy_ontonotes/features.msgpack",
        "pkuseg/spacy_ontonotes/weights.npz",
        "grapheme_mtl_merged_expanded_v1.json",
    ],
)
def test_the_quick_check_notices_one_changed_letter_in_the_data_of_a_language(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MULTILINGUAL.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"letters": "abc"}')
    for name in MULTILINGUAL.safetensors:
        save_file({"w": np.zeros((2, 3), np.float32)}, tmp_path / name)
    written = record(tmp_path, variant=MULTILINGUAL, repository="own", revision="-")
    monkeypatch.setattr("chatterbox_prewarm.weights.record._SMALL", 0)
    check_quickly(tmp_path, written)
    (tmp_path / path).write_text('{"letters": "abd"}')
    with pytest.raises(WeightsError, match=f"{re.escape(path)}: sha256"):
        check_quickly(tmp_path, written)


def test_a_pickle_is_not_recorded(checkpoint: Path) -> None:
    write_zip_pickle(checkpoint / T3)
    with pytest.raises(WeightsError, match="loading a pickle runs the code in it"):
        record(checkpoint, variant=ENGLISH, repository="own", revision="-")
    assert not (checkpoint / "weights.json").exists()


def test_a_checkpoint_without_a_record_is_refused_with_the_command_that_records_it(checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no weights\.json") as caught:
        verify(checkpoint)
    assert f"weights record {checkpoint}" in caught.value.next_step
    assert caught.value.exit_code == 10


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no weights directory") as caught:
        verify(tmp_path / "nowhere")
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema=2), "has schema 2; this version reads 1"),
        (lambda raw: raw.pop("schema"), "cannot be read"),
        (lambda raw: raw.pop("files"), "cannot be read"),
        (lambda raw: raw.update(surplus=1), "cannot be read"),
        (lambda raw: raw.update(files=[{"path": "x"}]), "cannot be read"),
        (lambda raw: raw.update(synthetic="yes"), "cannot be read"),
        (lambda raw: raw.update(variant="klingon"), "has the variant 'klingon'; this version knows english"),
    ],
)
def test_an_invalid_record_is_refused(recorded: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = recorded / "weights.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(WeightsError, match=message) as caught:
        read_record(recorded)
    assert caught.value.exit_code == 10


@pytest.mark.parametrize("content", [b"", b"{half", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_record_that_is_not_a_json_object_is_refused(recorded: Path, content: bytes) -> None:
    (recorded / "weights.json").write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read"):
        read_record(recorded)


def test_an_unknown_variant_is_refused_with_the_known_names() -> None:
    assert get_variant("english") is ENGLISH
    with pytest.raises(BadInputError, match="no model variant 'klingon'") as caught:
        get_variant("klingon")
    assert "english" in caught.value.next_step
