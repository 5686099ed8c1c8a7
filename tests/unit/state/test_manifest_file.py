"""Test that manifests keep every field when they are written and read, and that invalid ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION, FamilyEntry, Manifest, Measurements, Provenance
from chatterbox_prewarm.state.manifest_file import (
    manifest_to_json,
    parse_manifest,
    read_manifest_bytes,
    write_manifest,
)
from chatterbox_prewarm.system.digests import FileEntry
from tests.helpers.states import FITTING, MEASURED, PROVENANCE, make_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parent / "fixtures"
#: How an error names the schema.
SCHEMA = f"schema {SCHEMA_VERSION}"


def manifest_with(*entries: FileEntry) -> Manifest:
    """Return a manifest with one family of these files."""
    family = FamilyEntry(name="numba", requires=FITTING, files=entries, seconds_spent=0.0, seconds_saved=0.0)
    return make_manifest([family])


def file(path: str) -> FileEntry:
    return FileEntry(path=path, size=3, sha256="3" * 64)


def parse(data: str | bytes) -> Manifest:
    return parse_manifest(data if isinstance(data, bytes) else data.encode(), source="warm/manifest.json")


def read_fixture(version: int) -> str:
    """Return a manifest that the first version with this schema wrote."""
    return (FIXTURES / f"manifest-v{version}.json").read_text(encoding="utf-8")


def test_a_written_manifest_is_read_back_and_equal_manifests_have_equal_bytes(tmp_path: Path) -> None:
    manifest = manifest_with(file("numba/b"), file("numba/a"))
    write_manifest(manifest, tmp_path)
    data = read_manifest_bytes(tmp_path)
    assert parse(data) == manifest
    assert manifest_to_json(parse(data)).encode() == data


def test_writing_leaves_one_read_only_file_and_no_temporary_file(tmp_path: Path) -> None:
    write_manifest(manifest_with(file("numba/a")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6])
def test_a_manifest_of_every_schema_can_be_read(version: int) -> None:
    manifest = parse(read_fixture(version))
    assert manifest.schema == version
    assert parse(manifest_to_json(manifest)).schema == SCHEMA_VERSION
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


def test_a_manifest_of_the_present_schema_is_written_with_the_same_bytes() -> None:
    text = read_fixture(SCHEMA_VERSION)
    assert manifest_to_json(parse(text)) == text


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    """Return the text of a valid manifest after a change of its fields."""
    raw: dict[str, Any] = json.loads(manifest_to_json(manifest_with(file("numba/a"))))
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ not JSON", "is not JSON"),
        ("", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no schema version"),
        ('"schema"', "has no schema version"),
        (edited(lambda raw: raw.pop("schema")), "has no schema version"),
        (edited(lambda raw: raw.update(schema=True)), "has no schema version"),
        (edited(lambda raw: raw.update(schema="1")), "has no schema version"),
        (edited(lambda raw: raw.update(schema=0)), "has no schema version"),
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
        (edited(lambda raw: raw["reference"].update(text=" ")), "the text is empty"),
        (edited(lambda raw: raw["reference"].update(text="a" * 1001)), "more than the limit of 1000"),
        (edited(lambda raw: raw["reference"].update(voice="nobody")), "the voice 'nobody', which the state does not"),
        (edited(lambda raw: raw["reference"].update(voice="../x")), "cannot name a voice"),
        (edited(lambda raw: raw["reference"].update(seed=-1)), "seed of the reference is -1"),
        (edited(lambda raw: raw["reference"].update(seed=2**32)), "seed of the reference is 4294967296"),
        (
            edited(lambda raw: raw["reference"].update(max_new_tokens=10**12)),
            "max_new_tokens of the reference is 10000",
        ),
        (edited(lambda raw: raw["reference"].update(max_new_tokens=2)), "max_new_tokens of the reference is 2"),
        (edited(lambda raw: raw["reference"].update(max_new_tokens=1001)), "max_new_tokens of the reference is 1001"),
        (edited(lambda raw: raw["reference"].update(threads=0)), "threads of the reference is 0"),
        (edited(lambda raw: raw["reference"].update(device="tpu")), "unknown device 'tpu'"),
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
def test_an_invalid_manifest_is_refused_with_the_reason(text: str | bytes, message: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        parse(text)
    assert caught.value.message.startswith("warm/manifest.json")
    assert message in caught.value.message
    assert "bake" in caught.value.next_step
    assert caught.value.exit_code == 12


def test_a_manifest_of_100_megabytes_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(IntegrityError, match="cannot be read: it has more than 4194304 bytes"):
        read_manifest_bytes(tmp_path)


def test_a_newer_schema_is_refused_with_the_advice_to_upgrade() -> None:
    with pytest.raises(IntegrityError, match="has schema 7; this version reads schemas up to 6") as caught:
        parse('{"schema": 7, "fields": "unknown"}')
    assert "upgrade" in caught.value.next_step


def test_a_state_that_was_compiled_without_its_gpu_has_no_reference_audio() -> None:
    manifest = manifest_with(file("numba/a"))
    silent = replace(manifest.reference, samples=0, tokens_sha256="", pcm_sha256="")
    crossed = replace(manifest, cross_compiled=True, reference=silent)
    assert parse(manifest_to_json(crossed)) == crossed
    for wrong in (replace(manifest, cross_compiled=True), replace(manifest, reference=silent)):
        with pytest.raises(IntegrityError, match="exactly if the state was baked on its device"):
            parse(manifest_to_json(wrong))


@pytest.mark.parametrize("path", ["../x", "numba/../../x", "/etc/passwd", "numba/..", "numba/a\0b"])
def test_a_path_that_leaves_the_state_is_refused(path: str) -> None:
    with pytest.raises(IntegrityError, match="leaves the warm state"):
        parse(manifest_to_json(manifest_with(file(path))))


@pytest.mark.parametrize("path", ["bytecode/modules.pack", "modules.pack", "numba2/a", ""])
def test_a_file_outside_the_folder_of_its_family_is_refused(path: str) -> None:
    # Otherwise verifying the files of a family would not cover every file that is read for it.
    with pytest.raises(IntegrityError, match="not in the folder of its family numba"):
        parse(manifest_to_json(manifest_with(file(path))))


def test_a_changed_byte_anywhere_in_a_manifest_is_noticed() -> None:
    content = manifest_to_json(manifest_with(file("numba/a"))).encode()
    for position, byte in enumerate(content):
        for other in {byte ^ 1, 0x0D if byte == 0x0A else byte ^ 2}:
            with pytest.raises(IntegrityError):
                parse(content[:position] + bytes([other]) + content[position + 1 :])
    assert parse(content) == manifest_with(file("numba/a"))


@pytest.mark.parametrize("version", [3, 4])
def test_a_changed_digit_in_a_manifest_of_an_older_schema_is_noticed(version: int) -> None:
    text = read_fixture(version)
    for position, character in enumerate(text):
        if character.isdigit():
            changed = text[:position] + str((int(character) + 1) % 10) + text[position + 1 :]
            with pytest.raises(IntegrityError):
                parse(changed)
