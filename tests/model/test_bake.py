"""`bake`, `prove` and `verify` on the command line, also with damaged states and unusable directories."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.families.registry import applicable
from chatterbox_prewarm.model.warmup.settings import SWITCH
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.digests import FileEntry, set_digest, verify_files
from tests.conftest import run_cli, writable_copy
from tests.helpers.states import rewrite

if TYPE_CHECKING:
    from collections.abc import Callable


#: The cache families of the profile `eager`, which compiles nothing.
AS_WRITTEN = applicable("eager", "cpu")


@pytest.fixture
def state(baked: Path, tmp_path: Path) -> Path:
    """Copy the baked state, so that a test may damage it."""
    return writable_copy(baked, tmp_path / "warm")


def test_a_bake_reports_every_family_with_its_size_and_cost(baked: Path) -> None:
    manifest = State.read(baked).manifest
    assert [family.name for family in manifest.families] == list(AS_WRITTEN)
    for family in manifest.families:
        assert family.size > 0
        assert family.seconds_spent >= 0
    numba = manifest.family("numba")
    assert numba is not None
    assert numba.seconds_saved > 1, "librosa's first compile takes many seconds"
    shown = run_cli("inspect", "--warm", baked)
    assert shown.returncode == 0
    assert manifest.set_digest in shown.stdout
    assert all(name in shown.stdout for name in AS_WRITTEN)
    assert "profile eager, T3 in float32, without CUDA graphs" in shown.stdout


def test_inspect_json_prints_the_manifest(baked: Path) -> None:
    shown = run_cli("inspect", "--warm", baked, "--json")
    assert shown.stdout == (baked / "manifest.json").read_text()


def test_every_file_of_a_state_is_read_only(baked: Path) -> None:
    for path in (baked, *baked.rglob("*")):
        assert path.stat().st_mode & 0o222 == 0, path


def test_a_bake_records_the_time_and_memory_of_its_starts(baked: Path, mini: Path) -> None:
    measured = State.read(baked).manifest.measured
    assert measured.ready_seconds > 0
    assert measured.cold_seconds > 0
    weights = sum(path.stat().st_size for path in mini.glob("*.safetensors"))
    assert weights < measured.resident_bytes < 20e9
    assert measured.device_bytes == 0
    shown = run_cli("inspect", "--warm", baked).stdout
    assert f"warm start {measured.ready_seconds:.1f} s to ready" in shown
    assert f"cold start {measured.cold_seconds:.1f} s to attached" in shown
    assert f"peak memory: {measured.resident_bytes / 1e6:.0f} MB, 0 MB of the GPU" in shown


@pytest.mark.usefixtures("namespaces")
def test_an_isolated_process_hits_every_family(baked: Path, mini: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence.json"
    evidence.write_text('{"passed": false}')
    proven = run_cli("prove", "--warm", baked, "--weights", mini, "--evidence", evidence)
    assert proven.returncode == 0, proven.stdout + proven.stderr
    written = json.loads(evidence.read_text())
    assert written["passed"]
    isolation = written["observed"]["isolation"]
    assert isolation["uid"] == 12345
    assert isolation["hostname"] == "prewarm-proof"
    assert isolation["interfaces"] == ["lo"]
    assert not isolation["state_writable"]
    assert written["observed"]["metrics"]["misses"] == {}
    assert written["observed"]["metrics"]["hits"]["numba"] > 0


@pytest.mark.usefixtures("namespaces")
def test_other_audio_than_that_of_the_bake_fails_the_proof(state: Path, mini: Path) -> None:
    rewrite(state, lambda raw: raw["reference"].update(pcm_sha256="0" * 64))
    proven = run_cli("prove", "--warm", state, "--weights", mini)
    assert proven.returncode == 13
    assert "FAIL the audio is identical to the bake" in proven.stdout
    assert "S3Gen or the watermark" in proven.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_missing_family_fails_the_proof(state: Path, mini: Path) -> None:
    """Without the Numba cache a start compiles, and the proof names the compiled function."""

    def change(raw: dict[str, Any]) -> None:
        raw["families"] = [family for family in raw["families"] if family["name"] != "numba"]
        files = [FileEntry(**entry) for family in raw["families"] for entry in family["files"]]
        raw["set_digest"] = set_digest(files)

    rewrite(state, change)
    shutil.rmtree(state / "numba")
    proven = run_cli("prove", "--warm", state, "--weights", mini)
    assert proven.returncode == 13
    assert "FAIL no other miss" in proven.stdout
    assert "numba: not in the warm state" in proven.stdout
    assert "compiled librosa" in proven.stdout
    assert "FAIL no write into a cache" in proven.stdout


def _flip(state: Path, mini: Path) -> None:  # noqa: ARG001
    path = next((state / "numba").rglob("*.nbc"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _extra(state: Path, mini: Path) -> None:  # noqa: ARG001
    (state / "numba" / "extra.nbc").write_bytes(b"x")


def _link(state: Path, mini: Path) -> None:
    (state / "link").symlink_to(mini)


def _newer(state: Path, mini: Path) -> None:  # noqa: ARG001
    rewrite(state, lambda raw: raw.update(schema=SCHEMA_VERSION + 1))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_flip, "sha256"),
        (_extra, "extra.nbc"),
        (_link, "is a link"),
        (_newer, f"schema {SCHEMA_VERSION + 1}"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "prove"])
def test_a_damaged_state_is_refused(
    command: str, damage: Callable[[Path, Path], None], word: str, state: Path, mini: Path
) -> None:
    damage(state, mini)
    refused = run_cli(command, "--warm", state, "--weights", mini)
    assert refused.returncode == 12, refused.stderr
    assert word in refused.stderr
    assert "next:" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_flipped_byte_in_any_file_is_detected(state: Path) -> None:
    manifest = State.read(state).manifest
    assert {path.relative_to(state).parts[0] for path in state.rglob("*") if path.is_file()} == {
        "manifest.json",
        *AS_WRITTEN,
    }
    for entry in manifest.files:
        path = state / entry.path
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        (problem,) = verify_files(manifest.files, state)
        assert problem.startswith(f"{entry.path}: sha256")
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("family", "field", "words"),
    [
        ("numba", "numba", "numba: baked with 0.1, here"),
        ("numba", "arch", "processor architecture: baked with 0.1, here"),
        ("conditionals", "chatterbox", "chatterbox source: baked with 0.1, here"),
        ("bytecode", "python", "Python: baked with 0.1, here"),
        ("conditionals", "weights", "weights: baked with 0.1, here"),
    ],
)
def test_verify_names_the_field_that_does_not_match(
    family: str, field: str, words: str, state: Path, mini: Path
) -> None:
    def change(raw: dict[str, object]) -> None:
        entry = next(entry for entry in raw["families"] if entry["name"] == family)  # type: ignore[attr-defined]
        entry["requires"][field] = "0.1"

    rewrite(state, change)
    refused = run_cli("verify", "--warm", state, "--weights", mini)
    assert refused.returncode == 11
    assert words in refused.stderr


def test_verify_accepts_an_intact_state_that_fits(baked: Path, mini: Path) -> None:
    fine = run_cli("verify", "--warm", baked, "--weights", mini)
    assert fine.returncode == 0, fine.stderr
    assert fine.stdout.count("intact, fits this machine") == len(AS_WRITTEN)


@pytest.mark.slow
def test_a_killed_bake_keeps_the_old_state_and_a_second_bake_is_refused(
    state: Path, mini: Path, tmp_path: Path
) -> None:
    paths = ["--weights", str(mini), "--warm", str(state), "--cache", str(tmp_path / "cache")]
    command = ["bake", *paths, "--profile", "eager"]
    running = subprocess.Popen(
        [sys.executable, "-m", "chatterbox_prewarm", "--progress", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    try:
        for line in running.stderr:
            if "level 1" in line:
                break
        staging = list(tmp_path.glob(".warm.staging-*"))
        assert len(staging) == 1
        second = run_cli(*command)
        assert second.returncode == 16
        assert f"another process ({running.pid}) is writing" in second.stderr
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stderr.close()
    assert run_cli("verify", "--warm", state, "--weights", mini).returncode == 0
    assert not (staging[0] / "manifest.json").exists()
    for _ in range(100):  # the cold start's process ends when the bake ends
        if not _processes_naming(str(staging[0])):
            break
        time.sleep(0.1)
    assert _processes_naming(str(staging[0])) == []


def _processes_naming(text: str) -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            try:
                if text in (directory / "cmdline").read_text(errors="replace"):
                    found.append(int(directory.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_a_bake_on_a_full_disk_leaves_no_partial_state(mini: Path, small_disk: Path, tmp_path: Path) -> None:
    paths = ["--weights", str(mini), "--warm", str(small_disk / "warm"), "--cache", str(tmp_path / "cache")]
    full = run_cli("bake", *paths, "--profile", "eager", "--levels", "1")
    assert full.returncode == 16, full.stderr
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    assert [path.name for path in small_disk.iterdir()] == [".warm.lock"]


def test_a_full_disk_leaves_no_partial_checkpoint(small_disk: Path) -> None:
    full = run_cli("weights", "synthesize", small_disk / "mini", "--size", "mini")
    assert full.returncode == 16, full.stderr
    assert "free some space" in full.stderr
    assert [path.name for path in small_disk.iterdir()] == [".mini.lock"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--voice", "../x=clip.wav"], 16, "cannot name a voice"),
        (["--voice", "nameonly"], 2, "has no path"),
        (["--voice", "default=/nonexistent.wav"], 16, "built-in voice"),
        (["--voice", "v=/nonexistent.wav"], 16, "does not exist"),
        (["--voice", "v=/nonexistent.wav", "--without", "conditionals"], 16, "left out"),
        (["--device", "gpu"], 2, "no device 'gpu'"),
        (["--levels", "1,9"], 2, "levels"),
        (["--levels", "one"], 2, "levels"),
        (["--without", "everything"], 2, "no cache family"),
        (["--without", "aot"], 16, "needs the family 'aot'"),
        (["--profile", "compiled", "--without", "inductor"], 16, "needs the family 'inductor'"),
        (["--profile", "fast"], 2, "'fast' is not one of"),
        (["--t3-dtype", "int8"], 2, "'int8' is not one of"),
        (["--weights", "/nonexistent"], 10, "no weights directory"),
        (["--warm", "/proc/warm"], 16, "next:"),
        (["--cache", "/proc/cache"], 16, "cannot be written"),
    ],
)
def test_a_bake_with_invalid_options_is_refused_at_once(
    arguments: list[str], code: int, word: str, mini: Path, tmp_path: Path
) -> None:
    paths = ["--weights", str(mini), "--warm", str(tmp_path / "warm"), "--cache", str(tmp_path / "cache")]
    refused = run_cli("bake", *paths, *arguments)
    assert refused.returncode == code, refused.stderr
    assert word in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "warm").exists()


def test_a_bake_replaces_only_a_warm_state(mini: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for manifest in (None, '{"name": "a web app"}', '{"schema": 1, "set_digest": "", "weights": {}, "families": []}'):
        if manifest is not None:
            (mine / "manifest.json").write_text(manifest)
        refused = run_cli("bake", "--weights", mini, "--warm", mine, "--cache", tmp_path / "cache")
        assert refused.returncode == 16
        assert "something other than a warm state" in refused.stderr
        assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_bake_with_the_warm_up_switched_off_is_refused(mini: Path, tmp_path: Path) -> None:
    paths = ["--weights", str(mini), "--warm", str(tmp_path / "warm"), "--cache", str(tmp_path / "cache")]
    refused = run_cli("bake", *paths, env={**os.environ, SWITCH: "off"})
    assert refused.returncode == 16
    assert f"unset {SWITCH}" in refused.stderr


def test_packing_a_state_twice_gives_identical_layers(baked: Path, state: Path, tmp_path: Path) -> None:
    first = run_cli("pack", "--warm", baked, "--output", tmp_path / "one.tar.gz")
    second = run_cli("pack", "--warm", state, "--output", tmp_path / "elsewhere" / "two.tar.gz")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "elsewhere" / "two.tar.gz").read_bytes()
    listing = subprocess.run(
        ["tar", "-tvf", str(tmp_path / "one.tar.gz")], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    place = f"opt/chatterbox-prewarm/warm/{State.read(baked).key}"
    assert any(f"{place}/manifest.json" in line for line in listing)
    assert all(line.split()[1] == "0/0" and "1970-01-01" in line for line in listing)
    assert all(line.startswith(("dr-xr-xr-x", "drwxr-xr-x", "-r--r--r--")) for line in listing)


def test_a_damaged_state_is_not_packed(state: Path, mini: Path, tmp_path: Path) -> None:
    _flip(state, mini)
    refused = run_cli("pack", "--warm", state, "--output", tmp_path / "layer.tar.gz")
    assert refused.returncode == 12
    assert list(tmp_path.glob("*layer*")) == []


#: Python imports `sitecustomize` first. This one makes level 3 fail as on a GPU with too little memory.
_FULL_DEVICE = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "chatterbox_prewarm.model.warmup.strategy":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module.ChatterboxWarmupStrategy.warm_up_memory_pools = fill

        spec.loader.exec_module = exec_module
        return spec

def fill(strategy, model):
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_a_bake_without_a_family_that_runs_out_of_memory_in_a_level_completes(mini: Path, tmp_path: Path) -> None:
    """Two settings in one bake, because each bake takes half a minute."""
    (tmp_path / "sitecustomize.py").write_text(_FULL_DEVICE)
    paths = ("--weights", mini, "--warm", tmp_path / "warm", "--cache", tmp_path / "cache")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    arguments = ("--profile", "eager", "--levels", "2,3", "--without", "numba")
    baked = run_cli("--progress", "bake", *paths, *arguments, env=env)
    assert baked.returncode == 0, baked.stderr
    manifest = State.read(tmp_path / "warm").manifest
    assert [family.name for family in manifest.families] == [name for name in AS_WRITTEN if name != "numba"]
    assert "level 3: out of memory; the warm-up stops before this level" in baked.stderr
    assert manifest.levels == (2,)
    assert manifest.warmup_texts == (), "a CPU chooses no kernels by the length of a text"
    # A bake puts the new state in place only after a start from it has spoken and was warm.
    assert "start from the new state" in baked.stderr
