"""Find the checkpoints of a directory: one, or one for each of several variants."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.weights.checkpoints import checkpoints_in, choose_checkpoints, share_files
from chatterbox_prewarm.weights.record import RECORD_NAME, read_record, record, verify
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL, get_variant
from tests.helpers.states import record_weights

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def add(directory: Path, variant: str) -> Path:
    """Write the record of a checkpoint without files."""
    record_weights(directory)
    record = json.loads((directory / RECORD_NAME).read_text())
    (directory / RECORD_NAME).write_text(json.dumps({**record, "variant": variant}))
    return directory


def test_a_directory_with_a_record_is_one_checkpoint(tmp_path: Path) -> None:
    add(tmp_path, "multilingual")
    (tmp_path / "pkuseg").mkdir()
    assert checkpoints_in(tmp_path) == choose_checkpoints(tmp_path, ["multilingual"]) == {"multilingual": tmp_path}


def test_several_checkpoints_come_in_the_order_of_the_table_or_of_the_names(tmp_path: Path) -> None:
    both = {name: add(tmp_path / name, name) for name in ("multilingual", "english")}
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("")
    assert list(choose_checkpoints(tmp_path).items()) == [(name, both[name]) for name in ("english", "multilingual")]
    assert list(choose_checkpoints(tmp_path, ["multilingual", "english"])) == ["multilingual", "english"]
    assert choose_checkpoints(tmp_path, ["multilingual"]) == {"multilingual": both["multilingual"]}


def test_a_missing_or_doubled_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights directory"):
        checkpoints_in(tmp_path / "missing")
    with pytest.raises(WeightsError, match=r"has no weights\.json"):
        checkpoints_in(tmp_path)
    add(tmp_path / "a", "english")
    with pytest.raises(WeightsError, match="no checkpoint of the variant multilingual, only of: english") as caught:
        choose_checkpoints(tmp_path, ["multilingual"])
    assert f"weights fetch {tmp_path / 'multilingual'} --variant multilingual" in (caught.value.next_step or "")
    add(tmp_path / "b", "english")
    with pytest.raises(BadInputError, match="are both checkpoints of the variant english"):
        checkpoints_in(tmp_path)
    (tmp_path / "b" / RECORD_NAME).write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        checkpoints_in(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["english", "english"], "named twice"),
        (["english", "multilingual", "english"], "the variant english is named twice"),
        (["nobody"], "there is no model variant 'nobody'"),
        (["../english"], "there is no model variant"),
    ],
)
def test_invalid_names_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    add(tmp_path, "english")
    with pytest.raises(BadInputError, match=message):
        choose_checkpoints(tmp_path, names)


def checkpoint(directory: Path, variant: str, *, header: str, tensors: dict[str, NDArray[np.float32]]) -> Path:
    """Write a checkpoint with small tensors. `header` is metadata of S3Gen's file."""
    directory.mkdir()
    row = get_variant(variant)
    save_file({"a": np.full(4, len(variant), np.float32)}, directory / row.t3)
    save_file(tensors, directory / row.s3gen, {"made": header})
    save_file({"v": np.zeros(3, np.float32)}, directory / row.voice_encoder)
    tokens = ["[START]", "[STOP]", "[SPACE]", "[UNK]"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (directory / row.tokenizer).write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    (directory / row.builtin_voice).write_bytes(b"voice")
    for name in (*row.data, *(path for archive in row.archives for path in archive.files)):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    record(directory, variant=row, repository="none", revision="none")
    return directory


@pytest.mark.parametrize("header", ["here", "elsewhere"])
def test_checkpoints_share_the_files_with_equal_tensors(tmp_path: Path, header: str) -> None:
    same = {"flow.x": np.arange(1000, dtype=np.float32)}
    english = checkpoint(tmp_path / "english", "english", header="here", tensors=same)
    multilingual = checkpoint(tmp_path / "multilingual", "multilingual", header=header, tensors=same)
    before = read_record(multilingual)
    saved = share_files({"english": english, "multilingual": multilingual})
    for name in ("s3gen.safetensors", "ve.safetensors", "conds.pt"):
        assert (english / name).samefile(multilingual / name)
    assert saved >= 4000
    assert not (english / ENGLISH.t3).samefile(multilingual / MULTILINGUAL.t3)
    assert verify(english).variant == "english"
    after = verify(multilingual)
    assert after.set_digest == before.set_digest, "states and voices of the checkpoint stay usable"
    assert (after.files == before.files) == (header == "here")
    assert not list(multilingual.glob(".*"))
    assert share_files({"english": english, "multilingual": multilingual}) == 0


def test_files_with_other_tensors_are_not_shared(tmp_path: Path) -> None:
    first, second = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    second[-1] = 1
    english = checkpoint(tmp_path / "english", "english", header="", tensors={"flow.x": first})
    multilingual = checkpoint(tmp_path / "multilingual", "multilingual", header="", tensors={"flow.x": second})
    before = verify(multilingual)
    share_files({"english": english, "multilingual": multilingual})
    assert not (english / "s3gen.safetensors").samefile(multilingual / "s3gen.safetensors")
    assert verify(multilingual) == before
