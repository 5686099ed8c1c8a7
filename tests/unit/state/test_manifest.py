"""The manifest: round trips, what is refused when it is read, and what is refused in the folder beside it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.state.manifest import (
    SCHEMA_VERSION,
    FamilyEntry,
    Manifest,
    Measurements,
    Provenance,
    check_layout,
    manifest_from_json,
    manifest_to_json,
    read_manifest,
    write_manifest,
)
from chatterbox_prewarm.system.digests import FileEntry, scan, set_digest, verify_files
from tests.helpers.states import FITTING, MEASURED, PROVENANCE, make_manifest, make_state

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parent / "fixtures"
#: In an error that names it.
SCHEMA = f"schema {SCHEMA_VERSION}"
FILES = {"numba": {"librosa/deep/filters.nbi": b"index", "librosa/deep/filters.nbc": b"machine code"}}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    make_state(tmp_path / "warm", FILES)
    return tmp_path / "warm"


def with_files(*entries: FileEntry, name: str = "numba") -> Manifest:
    family = FamilyEntry(name=name, requires=FITTING, files=entries, seconds_spent=0.0, seconds_saved=0.0)
    return make_manifest([family])


def file(path: str) -> FileEntry:
    return FileEntry(path=path, size=3, sha256="3" * 64)


def test_what_is_written_is_read_back_and_equal_manifests_are_equal_bytes(state: Path, tmp_path: Path) -> None:
    first = read_manifest(state)
    again = tmp_path / "again"
    again.mkdir()
    write_manifest(first, again)
    assert read_manifest(again) == first
    assert (again / "manifest.json").read_bytes() == (state / "manifest.json").read_bytes()


def test_writing_leaves_one_read_only_file_and_nothing_temporary(tmp_path: Path) -> None:
    write_manifest(with_files(file("numba/a")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_a_manifest_of_every_schema_is_still_read(version: int) -> None:
    text = (FIXTURES / f"manifest-v{version}.json").read_text(encoding="utf-8")
    manifest = manifest_from_json(text, source="the fixture")
    assert manifest.schema == SCHEMA_VERSION
    assert manifest.execution == Execution(profile="eager")
    assert manifest.levels == (1, 2, 3)
    assert manifest.voices == ("default", "second")
    assert manifest.reference.text == "Grüße — a «reference»."
    numba = manifest.family("numba")
    assert numba is not None
    assert [entry.path for entry in numba.files] == ["numba/librosa/filters.nbc", "numba/librosa/filters.nbi"]
    assert numba.size == sum(entry.size for entry in numba.files) == 17
    assert manifest.family("aot") is None
    assert manifest.provenance == (PROVENANCE if version >= 4 else Provenance())
    assert manifest.measured == (MEASURED if version >= 5 else Measurements())
    assert Provenance().revision == Provenance().base_image == "not recorded"


def test_a_manifest_of_the_present_schema_is_written_byte_for_byte() -> None:
    text = (FIXTURES / f"manifest-v{SCHEMA_VERSION}.json").read_text(encoding="utf-8")
    assert manifest_to_json(manifest_from_json(text, source="the fixture")) == text


def test_the_set_digest_is_over_sorted_lines_and_so_independent_of_order() -> None:
    one, two = file("a/1"), FileEntry(path="b/2", size=1, sha256="4" * 64)
    lines = f"{'3' * 64}  a/1\n{'4' * 64}  b/2\n"
    assert set_digest([two, one]) == hashlib.sha256(lines.encode()).hexdigest()
    assert set_digest([replace(one, path="b/1"), two]) != set_digest([one, two])


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    raw: dict[str, Any] = json.loads(manifest_to_json(with_files(file("numba/a"))))
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{ not JSON", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "names no schema"),
        ('"schema"', "names no schema"),
        (edited(lambda raw: raw.pop("schema")), "names no schema"),
        (edited(lambda raw: raw.update(schema=True)), "names no schema"),
        (edited(lambda raw: raw.update(schema="1")), "names no schema"),
        (edited(lambda raw: raw.update(schema=0)), "names no schema"),
        (edited(lambda raw: raw.pop("weights")), "weights"),
        (edited(lambda raw: raw.pop("created")), "created"),
        (edited(lambda raw: raw["reference"].pop("seed")), "seed"),
        (edited(lambda raw: raw["families"][0]["files"][0].pop("sha256")), "sha256"),
        (edited(lambda raw: raw.update(surplus=1)), "surplus"),
        (edited(lambda raw: raw.update(families=None)), SCHEMA),
        (edited(lambda raw: raw.update(weights="none")), SCHEMA),
        (edited(lambda raw: raw["families"][0]["files"][0].update(size="3")), "size holds '3'"),
        (edited(lambda raw: raw["families"][0]["files"][0].update(path=3)), SCHEMA),
        (edited(lambda raw: raw["families"][0]["files"][0].update(path="numba/\ud800")), SCHEMA),
        (edited(lambda raw: raw["families"][0].update(requires={"arch": 5})), "requires holds 5"),
        (edited(lambda raw: raw.update(fingerprint=[])), SCHEMA),
        (edited(lambda raw: raw.update(voices=[1])), "voices holds 1"),
        (edited(lambda raw: raw.update(levels=[True])), "levels holds True"),
        (edited(lambda raw: raw["reference"].update(threads="2")), "threads holds '2'"),
        (edited(lambda raw: raw.pop("provenance")), "provenance"),
        (edited(lambda raw: raw["provenance"].update(parameters={"levels": 1})), "parameters holds 1"),
        (edited(lambda raw: raw.pop("measured")), "measured"),
        (edited(lambda raw: raw["measured"].update(resident_bytes=1.5)), "resident_bytes holds 1.5"),
        (edited(lambda raw: raw.update(tool="\ud800")), SCHEMA),
        (edited(lambda raw: raw.pop("digest")), "was changed"),
        (edited(lambda raw: raw.update(digest="5" * 64)), "was changed"),
        (edited(lambda raw: raw["families"].append(raw["families"][0])), "listed twice"),
        (edited(lambda raw: raw.update(set_digest="5" * 64)), "the set digest is " + "5" * 64),
        (edited(lambda raw: raw["families"][0]["files"][0].update(sha256="5" * 64)), "set digest"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        manifest_from_json(text, source="warm/manifest.json")
    assert caught.value.message.startswith("warm/manifest.json")
    assert says in caught.value.message
    assert "bake" in caught.value.next_step
    assert caught.value.exit_code == 12


def test_a_newer_schema_is_refused_with_the_advice_to_upgrade() -> None:
    with pytest.raises(IntegrityError, match="is of schema 6; this version reads up to 5") as caught:
        manifest_from_json('{"schema": 6, "fields": "unheard of"}', source="manifest.json")
    assert "upgrade" in caught.value.next_step


@pytest.mark.parametrize("path", ["../x", "numba/../../x", "/etc/passwd", "numba/..", "numba/a\0b"])
def test_a_path_that_leaves_the_state_is_refused(path: str) -> None:
    text = manifest_to_json(with_files(file(path)))
    with pytest.raises(IntegrityError, match="leaves the warm state"):
        manifest_from_json(text, source="manifest.json")


@pytest.mark.parametrize("path", ["bytecode/modules.pack", "modules.pack", "numba2/a", ""])
def test_a_file_outside_its_familys_folder_is_refused(path: str) -> None:
    # Otherwise a family could be verified by a list of files that are not those that it reads.
    with pytest.raises(IntegrityError, match="not in the folder of its family numba"):
        manifest_from_json(manifest_to_json(with_files(file(path))), source="manifest.json")


def test_one_flipped_byte_anywhere_in_a_manifest_is_seen(tmp_path: Path) -> None:
    content = manifest_to_json(with_files(file("numba/a"))).encode()
    path = tmp_path / "manifest.json"
    for place in range(len(content)):
        for other in {content[place] ^ 1, 0x0D if content[place] == 0x0A else content[place] ^ 2}:
            path.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
            with pytest.raises(IntegrityError):
                read_manifest(tmp_path)
    path.write_bytes(content)
    read_manifest(tmp_path)


@pytest.mark.parametrize("version", [3, 4])
def test_a_flipped_byte_in_a_manifest_of_a_schema_before_is_seen(version: int) -> None:
    text = (FIXTURES / f"manifest-v{version}.json").read_text(encoding="utf-8")
    for place, character in enumerate(text):
        if character.isdigit():
            changed = text[:place] + str((int(character) + 1) % 10) + text[place + 1 :]
            with pytest.raises(IntegrityError):
                manifest_from_json(changed, source="the fixture")


def test_a_folder_without_a_manifest_is_no_warm_state(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_manifest_that_is_no_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        (tmp_path / "manifest.json").mkdir()
    else:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_state_as_written_passes(state: Path) -> None:
    manifest = read_manifest(state)
    check_layout(manifest, state)
    assert verify_files(manifest.files, state) == []


def plant_symlink(state: Path) -> None:
    (state / "numba" / "link").symlink_to("/etc/hostname")


def plant_link_in_place(state: Path) -> None:
    victim = state / "numba" / "librosa" / "deep" / "filters.nbc"
    victim.rename(state.parent / "moved")
    victim.symlink_to(state.parent / "moved")


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (lambda state: (state / "numba" / "extra").write_bytes(b""), "does not list, the first: numba/extra"),
        (lambda state: (state / ".hidden").write_bytes(b""), "does not list, the first: .hidden"),
        (plant_symlink, "link or a special file"),
        (plant_link_in_place, "link or a special file"),
        (lambda state: (state / "folder").symlink_to(state / "numba"), "link or a special file"),
        (lambda state: os.mkfifo(state / "numba" / "pipe"), "link or a special file"),
        (lambda state: (state / "numba/librosa/deep/filters.nbi").chmod(0o664), "can be written by other users"),
        (lambda state: (state / "numba/librosa/deep/filters.nbi").chmod(0o646), "can be written by other users"),
        (lambda state: (state / "manifest.json").chmod(0o666), "can be written by other users"),
        (lambda state: (state / "numba" / "librosa" / "deep").chmod(0o775), "can be written by other users"),
        (lambda state: (state / "numba" / "librosa").chmod(0o777), "can be written by other users"),
        (lambda state: (state / "numba").chmod(0o757), "can be written by other users"),
        (lambda state: state.chmod(0o777), "can be written by other users"),
    ],
)
def test_a_state_that_others_may_have_changed_is_refused(
    state: Path, plant: Callable[[Path], object], says: str
) -> None:
    manifest = read_manifest(state)
    plant(state)
    with pytest.raises(IntegrityError, match=says):
        check_layout(manifest, state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(b"machine c0de"), "sha256"),
        (lambda path: path.write_bytes(b"machine"), "12 bytes expected, 7 found"),
        (lambda path: path.unlink(), "No such file"),
    ],
)
def test_each_damaged_file_is_named_and_no_other(state: Path, change: Callable[[Path], object], says: str) -> None:
    manifest = read_manifest(state)
    change(state / "numba" / "librosa" / "deep" / "filters.nbc")
    problems = verify_files(manifest.files, state)
    assert len(problems) == 1
    assert problems[0].startswith("numba/librosa/deep/filters.nbc: ")
    assert says in problems[0]


def test_a_scan_refuses_links_and_lists_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    assert [(entry.path, entry.size) for entry in scan(tmp_path)] == [("a", 3), ("b/2", 3)]
    (tmp_path / "c").symlink_to("a")
    with pytest.raises(IntegrityError):
        scan(tmp_path)
