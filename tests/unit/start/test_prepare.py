"""`prepare`, without torch: what is used, what is left out and why, and what ends a start."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm import errors
from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.families.bytecode import PACK_NAME, bytecode, write_pack
from chatterbox_prewarm.start.prepared import POLICIES
from chatterbox_prewarm.state.manifest import read_manifest, write_manifest
from chatterbox_prewarm.system.digests import scan, set_digest
from chatterbox_prewarm.system.json_subprocess import parse_report
from tests.helpers.children import TIMEOUT, call, start
from tests.helpers.states import FITTING, make_state, record_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ALL = ["bytecode", "numba", "signal", "conditionals"]


def build(tmp_path: Path, requires: Mapping[str, Mapping[str, str]] | None = None, skip: str = "") -> Path:
    """A warm state whose pack of bytecode is real and whose other families hold made-up files."""
    spec = importlib.util.find_spec("colorsys")
    assert spec is not None
    assert spec.origin is not None
    write_pack(tmp_path / "pack", {spec.origin: bytecode(spec.origin)})
    families = {
        "bytecode": {PACK_NAME: (tmp_path / "pack").read_bytes()},
        "numba": {"librosa/filters.nbc": b"machine code", "librosa/filters.nbi": b"index"},
        "signal": {"constants.safetensors": b"constants"},
        "conditionals": {"default.safetensors": b"voice"},
    }
    families.pop(skip, None)
    make_state(tmp_path / "warm", families, requires)
    return tmp_path / "warm"


def prepare(tmp_path: Path, policy: str = "fallback", **options: Any) -> dict[str, Any]:
    places = {name: str(tmp_path / name) for name in ("warm", "weights", "cache")}
    record_weights(tmp_path / "weights")
    return call("prepare", policy=policy, **{**places, **options})


def misses(seen: dict[str, Any]) -> dict[str, int]:
    counted: dict[str, int] = seen["metrics"]["misses"]
    return {name: count for name, count in counted.items() if name != "bytecode"}


def reasons(seen: dict[str, Any], family: str) -> list[str]:
    return [reason for reason in seen["metrics"]["reasons"] if reason.startswith(f"{family}: ")]


@pytest.mark.parametrize("policy", ["require", "fallback"])
def test_a_state_that_fits_is_used_as_a_whole(tmp_path: Path, policy: str) -> None:
    build(tmp_path)
    seen = prepare(tmp_path, policy, imports=["colorsys"])
    assert sorted(seen["usable"]) == sorted(ALL)
    assert seen["has_manifest"]
    assert seen["heavy"] == []
    assert misses(seen) == {}
    assert seen["metrics"]["hits"] == {"bytecode": 1}
    cache = tmp_path / "cache"
    assert (cache / "numba" / "librosa" / "filters.nbc").read_bytes() == b"machine code"
    assert seen["environment"] == {
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "NUMBA_CPU_NAME": "generic",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hub"),
    }
    assert "prepare" in [phase["name"] for phase in seen["metrics"]["phases"]]


def test_a_state_is_never_written_to(tmp_path: Path) -> None:
    warm = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in warm.rglob("*")}
    prepare(tmp_path, "require")
    assert {path: path.stat().st_mtime_ns for path in warm.rglob("*")} == before


def test_a_seeded_cache_that_was_tampered_with_is_seeded_again(tmp_path: Path) -> None:
    build(tmp_path)
    prepare(tmp_path)
    seeded = tmp_path / "cache" / "numba" / "librosa" / "filters.nbc"
    seeded.write_bytes(b"other code!!")
    prepare(tmp_path)
    assert seeded.read_bytes() == b"machine code"


def test_a_cache_that_others_could_write_is_closed_to_them(tmp_path: Path) -> None:
    build(tmp_path)
    numba = tmp_path / "cache" / "numba"
    (numba / "planted").mkdir(parents=True)
    numba.chmod(0o777)
    (tmp_path / "elsewhere").mkdir()
    (numba / "librosa").symlink_to(tmp_path / "elsewhere")
    (numba / "planted" / "index.nbi").write_bytes(b"a pickle")
    prepare(tmp_path)
    assert numba.stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (numba / "librosa" / "filters.nbc").read_bytes() == b"machine code"
    assert not (numba / "planted" / "index.nbi").exists()


def test_what_numba_is_writing_in_another_process_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path)
    writing = tmp_path / "cache" / "numba" / "librosa" / "other.nbi.tmp.0123456789abcdef"
    writing.parent.mkdir(parents=True)
    writing.write_bytes(b"half of it")
    prepare(tmp_path)
    assert writing.exists()


def test_several_processes_start_from_one_cache_at_once(tmp_path: Path) -> None:
    files = {f"librosa/{number}.nbc": bytes([number]) * 2_000_000 for number in range(10)}
    make_state(tmp_path / "warm", {"numba": files})
    arguments = {"warm": str(tmp_path / "warm"), "cache": str(tmp_path / "cache"), "times": 5}
    processes = [start("seed_numba", arguments) for _ in range(4)]
    reports = [(process.communicate(timeout=TIMEOUT)[0], process.returncode) for process in processes]
    assert [parse_report(*report) for report in reports] == [{"seeded": 5}] * 4
    seeded = tmp_path / "cache" / "numba"
    assert {str(path.relative_to(seeded)) for path in seeded.rglob("*.*")} == set(files)


def test_off_ignores_a_state_whatever_it_is_like(tmp_path: Path) -> None:
    warm = build(tmp_path, {"numba": {"arch": "another"}})
    (warm / "extra").write_text("x")
    seen = prepare(tmp_path, "off")
    assert (seen["usable"], seen["has_manifest"], set(misses(seen))) == ([], False, {"numba", "signal", "conditionals"})
    assert list((tmp_path / "cache" / "numba").iterdir()) == []


def corrupt(warm: Path) -> None:
    (warm / "numba" / "librosa" / "filters.nbc").write_bytes(b"machine c0de")


def test_a_corrupt_family_ends_a_start_under_require(tmp_path: Path) -> None:
    corrupt(build(tmp_path))
    with pytest.raises(errors.IntegrityError, match=r"family numba .* numba/librosa/filters\.nbc: sha256") as caught:
        prepare(tmp_path, "require")
    assert caught.value.exit_code == 12
    assert not (tmp_path / "cache" / "numba").exists()


def test_a_corrupt_family_is_left_out_and_never_read_under_fallback(tmp_path: Path) -> None:
    corrupt(build(tmp_path))
    seen = prepare(tmp_path, "fallback")
    assert "numba" not in seen["usable"]
    assert len(seen["usable"]) == 3
    assert misses(seen) == {"numba": 1}
    (reason,) = reasons(seen, "numba")
    assert "not as baked: numba/librosa/filters.nbc: sha256" in reason
    assert list((tmp_path / "cache" / "numba").iterdir()) == []


def test_a_missing_file_leaves_its_family_out(tmp_path: Path) -> None:
    (build(tmp_path) / "bytecode" / PACK_NAME).unlink()
    seen = prepare(tmp_path, imports=["colorsys"])
    assert sorted(seen["usable"]) == ["conditionals", "numba", "signal"]
    assert seen["metrics"]["hits"] == {}
    assert "No such file" in reasons(seen, "bytecode")[0]


MISFIT = {"signal": {**FITTING, "torchaudio": "0.0.1"}}


def test_a_misfit_ends_a_start_under_require(tmp_path: Path) -> None:
    build(tmp_path, MISFIT)
    with pytest.raises(errors.FingerprintMismatchError, match=r"family signal .* torchaudio: baked with 0\.0\.1, here"):
        prepare(tmp_path, "require")


def test_a_misfit_is_left_out_under_fallback_naming_the_field_and_both_values(tmp_path: Path) -> None:
    build(tmp_path, {"signal": {"arch": "m68k"}})
    seen = prepare(tmp_path, "fallback")
    assert sorted(seen["usable"]) == ["bytecode", "conditionals", "numba"]
    assert misses(seen) == {"signal": 1}
    here = FITTING["arch"]
    assert reasons(seen, "signal") == [f"signal: left out: processor architecture: baked with m68k, here {here}"]


def test_a_voice_of_other_weights_is_left_out(tmp_path: Path) -> None:
    build(tmp_path, {"conditionals": {"weights": "f" * 64}})
    (reason,) = reasons(prepare(tmp_path), "conditionals")
    assert f"weights: baked with {'f' * 64}, here {record_weights(tmp_path / 'weights')}" in reason


@pytest.mark.parametrize("policy", ["require", "fallback", "off"])
def test_no_start_can_do_without_weights(tmp_path: Path, policy: str) -> None:
    build(tmp_path)
    with pytest.raises(WeightsError, match="no weights directory"):
        call("prepare", policy=policy, warm=str(tmp_path / "warm"), weights="/nowhere", cache=str(tmp_path / "cache"))


def test_a_changed_source_file_leaves_out_the_family_that_depends_on_it(tmp_path: Path) -> None:
    source = tmp_path / "filters.py"
    source.write_text("x = 1\n")
    stamp = f"6 bytes, modified at {source.stat().st_mtime!r}"
    build(tmp_path, {"numba": {f"source:{source}": stamp}})
    assert "numba" in prepare(tmp_path)["usable"]
    os.utime(source, (1, 1))
    seen = prepare(tmp_path)
    assert "numba" not in seen["usable"]
    assert f"source file {source}: baked with {stamp}, here 6 bytes, modified at 1.0" in reasons(seen, "numba")[0]


def test_a_family_that_was_not_baked_or_is_unknown_is_a_miss(tmp_path: Path) -> None:
    warm = build(tmp_path, skip="signal")
    manifest = read_manifest(warm)
    (warm / "conditionals").rename(warm / "future")
    renamed = tuple(
        replace(entry, name="future", files=scan(warm, below="future")) if entry.name == "conditionals" else entry
        for entry in manifest.families
    )
    manifest = replace(manifest, families=renamed)
    write_manifest(replace(manifest, set_digest=set_digest(manifest.files)), warm)
    seen = prepare(tmp_path)
    assert sorted(seen["usable"]) == ["bytecode", "numba"]
    assert misses(seen) == {"signal": 1, "future": 1, "conditionals": 1}


def remove_manifest(warm: Path) -> None:
    (warm / "manifest.json").unlink()


def make_newer(warm: Path) -> None:
    path = warm / "manifest.json"
    raw = {**json.loads(path.read_text(encoding="utf-8")), "schema": 99}
    path.chmod(0o644)
    path.write_text(json.dumps(raw), encoding="utf-8")


UNUSABLE: list[tuple[Callable[[Path], object], str]] = [
    (remove_manifest, "holds no manifest.json"),
    (make_newer, "is of schema 99"),
    (lambda warm: (warm / "numba" / "extra.nbi").write_text("x"), "does not list, the first: numba/extra.nbi"),
    (lambda warm: (warm / "link").symlink_to("/etc"), "is a link or a special file"),
    (lambda warm: (warm / "numba").chmod(0o777), "can be written by other users"),
]


@pytest.mark.parametrize(("damage", "says"), UNUSABLE)
def test_a_state_that_is_unusable_as_a_whole_ends_a_start_under_require(
    tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(build(tmp_path))
    with pytest.raises(errors.IntegrityError, match=says) as caught:
        prepare(tmp_path, "require")
    assert caught.value.exit_code == 12


@pytest.mark.parametrize(("damage", "says"), UNUSABLE)
def test_a_state_that_is_unusable_as_a_whole_is_ignored_under_fallback(
    tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(build(tmp_path))
    seen = prepare(tmp_path, "fallback")
    assert (seen["usable"], seen["has_manifest"]) == ([], False)
    assert misses(seen) == {"all": 1}
    assert says in reasons(seen, "all")[0]
    assert "NUMBA_CACHE_DIR" in seen["environment"]  # a cold start still has its cache
    assert list((tmp_path / "cache" / "numba").iterdir()) == []


def test_no_state_at_all_is_a_cold_start(tmp_path: Path) -> None:
    seen = prepare(tmp_path)
    assert (seen["usable"], misses(seen)) == ([], {"all": 1})


@pytest.mark.parametrize(
    ("policy", "place"),
    [("require", "file"), ("fallback", "file"), ("off", "file"), ("fallback", "file/below"), ("off", "/proc/cache")],
)
def test_a_cache_that_cannot_be_written_is_bad_input_under_every_policy(
    tmp_path: Path, policy: str, place: str
) -> None:
    build(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(errors.BadInputError, match="cannot be written") as caught:
        prepare(tmp_path, policy, cache=str(tmp_path / place))
    assert caught.value.exit_code == 16
    assert "emptyDir" in caught.value.next_step


def test_an_unknown_policy_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(errors.BadInputError, match="no policy 'maybe'") as caught:
        prepare(tmp_path, "maybe")
    assert all(policy in caught.value.next_step for policy in POLICIES)
