"""Test which families `prepare` uses, why it leaves out others and how to mend that, and which errors end a start."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
import pytest

from chatterbox_prewarm import errors
from chatterbox_prewarm.cli import cli
from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.families.bytecode import PACK_NAME, bytecode, write_pack
from chatterbox_prewarm.start.options import POLICIES
from chatterbox_prewarm.state.manifest_file import write_manifest
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.digests import scan, set_digest
from chatterbox_prewarm.system.json_subprocess import parse_report
from chatterbox_prewarm.weights.record import record
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.helpers.children import TIMEOUT, call, start
from tests.helpers.states import FITTING, make_checkpoint, make_state, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ALL = ["bytecode", "numba", "signal", "conditionals"]


def build(tmp_path: Path, requires: Mapping[str, Mapping[str, str]] | None = None, skip: str = "") -> Path:
    """Write a warm state with real bytecode; its other families have made-up files. The family `skip` is missing."""
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
    """Run `prepare` in another process, and return its report."""
    paths = {name: str(tmp_path / name) for name in ("warm", "weights", "cache")}
    record_weights(tmp_path / "weights")
    return call("prepare", policy=policy, **{**paths, **options})


def misses(report: dict[str, Any]) -> dict[str, int]:
    """Return the misses of each family except `bytecode`, which depend on the imports of the test process."""
    counts: dict[str, int] = report["metrics"]["misses"]
    return {name: count for name, count in counts.items() if name != "bytecode"}


def reasons(report: dict[str, Any], family: str) -> list[str]:
    """Return the reasons for the misses of a family."""
    return [reason for reason in report["metrics"]["reasons"] if reason.startswith(f"{family}: ")]


def next_step(report: dict[str, Any], family: str) -> str:
    """Return the next step of the only miss of a family, after a check that its commands have these options."""
    (reason,) = reasons(report, family)
    found = str(report["metrics"]["next_steps"][reason])
    for command in re.findall(r"`(chatterbox-prewarm .*?)`", found):
        _, name, *arguments = shlex.split(command)
        known = cli.get_command(click.Context(cli), name)
        assert known is not None, command
        known.make_context(name, arguments)  # raises an error for an unknown option or an invalid value
    return found


@pytest.mark.parametrize("policy", ["require", "fallback"])
def test_all_families_of_a_fitting_state_are_used(tmp_path: Path, policy: str) -> None:
    build(tmp_path)
    report = prepare(tmp_path, policy, imports=["colorsys"])
    assert sorted(report["usable"]) == sorted(ALL)
    assert report["has_manifest"]
    assert report["heavy"] == []
    assert misses(report) == {}
    assert report["metrics"]["hits"] == {"bytecode": 1}
    cache = tmp_path / "cache"
    assert (cache / "numba" / "librosa" / "filters.nbc").read_bytes() == b"machine code"
    assert report["environment"] == {
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "NUMBA_CPU_NAME": "generic",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "hub"),
    }
    assert "prepare" in [phase["name"] for phase in report["metrics"]["phases"]]


def test_a_start_never_writes_into_the_state(tmp_path: Path) -> None:
    warm = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in warm.rglob("*")}
    prepare(tmp_path, "require")
    assert {path: path.stat().st_mtime_ns for path in warm.rglob("*")} == before


def test_a_changed_file_in_the_cache_is_replaced(tmp_path: Path) -> None:
    build(tmp_path)
    prepare(tmp_path)
    cached = tmp_path / "cache" / "numba" / "librosa" / "filters.nbc"
    cached.write_bytes(b"other code!!")
    prepare(tmp_path)
    assert cached.read_bytes() == b"machine code"


def test_a_cache_that_others_can_write_is_emptied_and_made_private(tmp_path: Path) -> None:
    build(tmp_path)
    prepare(tmp_path)
    numba = tmp_path / "cache" / "numba"
    (numba / "planted").mkdir()
    numba.chmod(0o777)
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(numba / "librosa")
    (numba / "librosa").symlink_to(tmp_path / "elsewhere")
    (numba / "planted" / "index.nbi").write_bytes(b"a pickle")
    prepare(tmp_path)
    assert numba.stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (numba / "librosa" / "filters.nbc").read_bytes() == b"machine code"
    assert not (numba / "planted" / "index.nbi").exists()


def test_a_start_removes_no_file_that_this_project_did_not_write(tmp_path: Path) -> None:
    warm = build(tmp_path)
    mine = tmp_path / "projects" / "numba" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    for cache, message in (
        (tmp_path / "projects", "that this program did not write"),
        (warm, f"is the warm state {warm}"),
        (warm / "cache", f"is inside the warm state {warm}"),
        (tmp_path / "weights" / "cache", "is inside the checkpoint"),
        (tmp_path, f"contains --warm {warm}"),
    ):
        with pytest.raises(errors.BadInputError, match=message):
            prepare(tmp_path, cache=str(cache))
    assert mine.read_text() == "years of work"
    State.open(warm).check_files()


def test_a_file_that_numba_writes_in_another_process_is_kept(tmp_path: Path) -> None:
    build(tmp_path)
    prepare(tmp_path)
    writing = tmp_path / "cache" / "numba" / "librosa" / "other.nbi.tmp.0123456789abcdef"
    writing.write_bytes(b"incomplete")
    prepare(tmp_path)
    assert writing.exists()


def test_several_processes_can_fill_the_same_cache_at_once(tmp_path: Path) -> None:
    files = {f"librosa/{number}.nbc": bytes([number]) * 2_000_000 for number in range(10)}
    make_state(tmp_path / "warm", {"numba": files})
    arguments = {"warm": str(tmp_path / "warm"), "cache": str(tmp_path / "cache"), "times": 5}
    processes = [start("fill_numba_cache", arguments) for _ in range(4)]
    reports = [(process.communicate(timeout=TIMEOUT)[0], process.returncode) for process in processes]
    assert [parse_report(*report) for report in reports] == [{"filled": 5}] * 4
    cache = tmp_path / "cache" / "numba"
    assert {str(path.relative_to(cache)) for path in cache.rglob("*.*")} == set(files)


def test_the_policy_off_ignores_any_state(tmp_path: Path) -> None:
    warm = build(tmp_path, {"numba": {"arch": "another"}})
    (warm / "extra").write_text("x")
    report = prepare(tmp_path, "off")
    assert (report["usable"], report["has_manifest"]) == ([], False)
    assert set(misses(report)) == {"numba", "signal", "conditionals"}
    assert next_step(report, "numba") == "start with the policy fallback or require"
    assert list((tmp_path / "cache" / "numba").iterdir()) == []


def damage_code(warm: Path) -> None:
    (warm / "numba" / "librosa" / "filters.nbc").write_bytes(b"machine c0de")


def test_a_damaged_family_ends_a_start_under_require(tmp_path: Path) -> None:
    damage_code(build(tmp_path))
    with pytest.raises(errors.IntegrityError, match=r"family numba .* numba/librosa/filters\.nbc: sha256") as caught:
        prepare(tmp_path, "require")
    assert caught.value.exit_code == 12
    assert not (tmp_path / "cache" / "numba").exists()


def test_a_damaged_family_is_left_out_and_never_read_under_fallback(tmp_path: Path) -> None:
    damage_code(build(tmp_path))
    report = prepare(tmp_path, "fallback")
    assert "numba" not in report["usable"]
    assert len(report["usable"]) == 3
    assert misses(report) == {"numba": 1}
    (reason,) = reasons(report, "numba")
    assert "not read, its files differ from the manifest: numba/librosa/filters.nbc: sha256" in reason
    assert next_step(report, "numba").startswith("restore the warm state (pull the image again)")
    assert list((tmp_path / "cache" / "numba").iterdir()) == []


def test_a_family_with_a_missing_file_is_left_out(tmp_path: Path) -> None:
    (build(tmp_path) / "bytecode" / PACK_NAME).unlink()
    report = prepare(tmp_path, imports=["colorsys"])
    assert sorted(report["usable"]) == ["conditionals", "numba", "signal"]
    assert report["metrics"]["hits"] == {}
    assert "No such file" in reasons(report, "bytecode")[0]


DOES_NOT_FIT = {"signal": {**FITTING, "torchaudio": "0.0.1"}}


def test_a_family_that_does_not_fit_ends_a_start_under_require(tmp_path: Path) -> None:
    build(tmp_path, DOES_NOT_FIT)
    with pytest.raises(errors.FingerprintMismatchError, match=r"family signal .* torchaudio: baked with 0\.0\.1, here"):
        prepare(tmp_path, "require")


def test_a_family_that_does_not_fit_is_left_out_under_fallback_with_both_values(tmp_path: Path) -> None:
    build(tmp_path, {"signal": {"arch": "m68k"}})
    report = prepare(tmp_path, "fallback")
    assert sorted(report["usable"]) == ["bytecode", "conditionals", "numba"]
    assert misses(report) == {"signal": 1}
    here = FITTING["arch"]
    assert reasons(report, "signal") == [f"signal: left out: processor architecture: baked with m68k, here {here}"]
    paths = " ".join(f"--{name} {tmp_path / name}" for name in ("warm", "weights", "cache"))
    assert next_step(report, "signal") == (
        "bake on this kind of machine: `chatterbox-prewarm bake --device cpu --profile eager`; "
        f"`chatterbox-prewarm verify --device cpu {paths}` lists every difference"
    )


def test_a_family_that_needs_another_cache_path_is_mended_by_that_path(tmp_path: Path) -> None:
    build(tmp_path, {"signal": {"cache": "/elsewhere"}})
    report = prepare(tmp_path)
    assert misses(report) == {"signal": 1}
    assert next_step(report, "signal").startswith("start with the cache path of the bake, or bake with this one: `")


def test_voices_baked_with_other_weights_are_left_out(tmp_path: Path) -> None:
    build(tmp_path, {"conditionals": {"weights": "f" * 64}})
    (reason,) = reasons(prepare(tmp_path), "conditionals")
    assert f"weights: baked with {'f' * 64}, here {record_weights(tmp_path / 'weights')}" in reason


@pytest.mark.parametrize("policy", ["require", "fallback", "off"])
def test_missing_weights_end_a_start_under_every_policy(tmp_path: Path, policy: str) -> None:
    build(tmp_path)
    with pytest.raises(WeightsError, match="no weights directory"):
        call("prepare", policy=policy, warm=str(tmp_path / "warm"), weights="/nowhere", cache=str(tmp_path / "cache"))


def test_a_family_is_left_out_if_a_source_file_it_depends_on_changed(tmp_path: Path) -> None:
    source = tmp_path / "filters.py"
    source.write_text("x = 1\n")
    stamp = f"6 bytes, modified at {source.stat().st_mtime!r}"
    build(tmp_path, {"numba": {f"source:{source}": stamp}})
    assert "numba" in prepare(tmp_path)["usable"]
    os.utime(source, (1, 1))
    report = prepare(tmp_path)
    assert "numba" not in report["usable"]
    assert f"source file {source}: baked with {stamp}, here 6 bytes, modified at 1.0" in reasons(report, "numba")[0]


def test_a_missing_family_and_an_unknown_family_are_misses(tmp_path: Path) -> None:
    warm = build(tmp_path, skip="signal")
    manifest = State.read(warm).manifest
    (warm / "conditionals").rename(warm / "future")
    renamed = tuple(
        replace(entry, name="future", files=scan(warm, below="future")) if entry.name == "conditionals" else entry
        for entry in manifest.families
    )
    manifest = replace(manifest, families=renamed)
    write_manifest(replace(manifest, set_digest=set_digest(manifest.files)), warm)
    report = prepare(tmp_path)
    assert sorted(report["usable"]) == ["bytecode", "numba"]
    assert misses(report) == {"signal": 1, "future": 1, "conditionals": 1}
    assert next_step(report, "signal").startswith("bake it too, without `--without signal`: `")
    assert next_step(report, "future").startswith("upgrade chatterbox-prewarm, or bake with this version: `")


def remove_manifest(warm: Path) -> None:
    (warm / "manifest.json").unlink()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_newer(warm: Path) -> None:
    path = warm / "manifest.json"
    raw = {**json.loads(path.read_text(encoding="utf-8")), "schema": 99}
    path.chmod(0o644)
    path.write_text(json.dumps(raw), encoding="utf-8")


UNUSABLE: list[tuple[Callable[[Path], object], str]] = [
    (remove_manifest, "has no manifest.json"),
    (make_newer, "has schema 99"),
    (lambda warm: replace_by_pipe(warm / "manifest.json"), "cannot be read: it is a pipe and not a regular file"),
    (lambda warm: (warm / "numba" / "extra.nbi").write_text("x"), "does not list, the first: numba/extra.nbi"),
    (lambda warm: (warm / "link").symlink_to("/etc"), "is a link or a special file"),
    (lambda warm: (warm / "numba").chmod(0o777), "can be written by other users"),
]
UNUSABLE += [
    (lambda warm, change=change: rewrite(warm, lambda raw: raw["reference"].update(change)), next(iter(change)))  # type: ignore[misc]
    for change in ({"voice": "x"}, {"text": ""}, {"seed": -1}, {"max_new_tokens": 10**12})
]
if os.geteuid() == 0:  # only root can give a file to another user
    UNUSABLE.append((lambda warm: os.chown(warm / "bytecode" / PACK_NAME, 54321, 0), "belongs to another user"))


def downgrade(warm: Path) -> str:
    """Turn the manifest into one of schema 2, and return its digest."""
    path = warm / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for name in ("digest", "provenance", "measured"):
        del raw[name]
    path.chmod(0o644)
    path.write_text(json.dumps({**raw, "schema": 2}), encoding="utf-8")
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_manifest_without_a_digest_of_itself_is_used_with_one_warning_but_refused_under_require(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    digest = downgrade(build(tmp_path))
    assert sorted(prepare(tmp_path)["usable"]) == sorted(ALL)
    assert capfd.readouterr().err.count("has schema 2, which has no digest of the manifest") == 1
    with pytest.raises(errors.IntegrityError, match="has schema 2, which has no digest") as caught:
        prepare(tmp_path, "require")
    assert "--expect-digest" in caught.value.next_step
    assert prepare(tmp_path, "require", expected_digest=digest)["has_manifest"]


def test_a_pipe_in_place_of_the_manifest_does_not_block_a_start_that_ignores_the_state(tmp_path: Path) -> None:
    replace_by_pipe(build(tmp_path) / "manifest.json")
    assert prepare(tmp_path, "off")["usable"] == []


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["weights.json", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_of_the_weights_ends_a_start(tmp_path: Path, policy: str, name: str) -> None:
    build(tmp_path)
    weights = make_checkpoint(tmp_path / "checkpoint")
    record(weights, variant=ENGLISH, repository="someone/voice", revision="a" * 40)
    replace_by_pipe(weights / name)
    with pytest.raises(WeightsError, match=name):
        prepare(tmp_path, policy, weights=str(weights))


@pytest.mark.parametrize(("damage", "message"), UNUSABLE)
def test_an_unusable_state_ends_a_start_under_require(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(build(tmp_path))
    with pytest.raises(errors.IntegrityError, match=message) as caught:
        prepare(tmp_path, "require")
    assert caught.value.exit_code == 12


@pytest.mark.parametrize(("damage", "message"), UNUSABLE)
def test_an_unusable_state_is_ignored_under_fallback(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(build(tmp_path))
    report = prepare(tmp_path, "fallback")
    assert (report["usable"], report["has_manifest"]) == ([], False)
    assert misses(report) == {"all": 1}
    assert message in reasons(report, "all")[0]
    with pytest.raises(errors.IntegrityError) as caught:
        prepare(tmp_path, "require")
    assert next_step(report, "all") == caught.value.next_step
    assert "NUMBA_CACHE_DIR" in report["environment"]  # a cold start uses the cache too
    assert list((tmp_path / "cache" / "numba").iterdir()) == []


def test_a_start_without_a_state_is_cold(tmp_path: Path) -> None:
    report = prepare(tmp_path)
    assert (report["usable"], misses(report)) == ([], {"all": 1})
    assert next_step(report, "all") == "bake the warm state again with `chatterbox-prewarm bake`"


def test_a_package_that_was_imported_too_early_is_a_miss_that_names_the_functions_to_call(tmp_path: Path) -> None:
    report = prepare(tmp_path, first=["numba"])
    assert misses(report)["late"] == 1
    assert next_step(report, "late").endswith("before you import numba")


def test_of_several_states_each_one_that_cannot_be_read_is_a_miss_with_its_next_step(tmp_path: Path) -> None:
    states = tmp_path / "states"
    states.mkdir(mode=0o755)
    build(tmp_path, {"signal": {"arch": "m68k"}}).rename(states / "other")
    build(tmp_path).rename(states / "newer")
    make_newer(states / "newer")
    states.rename(tmp_path / "warm")
    report = prepare(tmp_path)
    assert misses(report) == {"signal": 1, "states": 1}
    assert "the state newer is left out: " in reasons(report, "states")[0]
    assert next_step(report, "states") == "upgrade chatterbox-prewarm, or bake with this version"


@pytest.mark.parametrize(
    ("policy", "cache"),
    [("require", "file"), ("fallback", "file"), ("off", "file"), ("fallback", "file/below"), ("off", "/proc/cache")],
)
def test_a_cache_that_cannot_be_written_is_refused_under_every_policy(tmp_path: Path, policy: str, cache: str) -> None:
    build(tmp_path)
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(errors.BadInputError, match="cannot be written") as caught:
        prepare(tmp_path, policy, cache=str(tmp_path / cache))
    assert caught.value.exit_code == 16
    assert "emptyDir" in caught.value.next_step


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.BadInputError, match="no policy 'maybe'") as caught:
        prepare(tmp_path, "maybe")
    assert all(policy in caught.value.next_step for policy in POLICIES)
