"""Test that a state is read once, that its trust comes first, and that its folder, files and key are right."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.state.signing import sign
from chatterbox_prewarm.state.state import State, state_key
from tests.helpers.children import call
from tests.helpers.keys import make_keys
from tests.helpers.states import FITTING, make_state, make_state_for, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

H100 = {"arch": "x86_64", "gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "torch": "2.6.0"}
CODE = "numba/librosa/deep/filters.nbc"
INDEX = "numba/librosa/deep/filters.nbi"


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """Write a state with one family."""
    files = {"librosa/deep/filters.nbi": b"index", "librosa/deep/filters.nbc": b"machine code"}
    make_state(tmp_path / "warm", {"numba": files})
    return tmp_path / "warm"


# ---- opening a state


def test_an_undamaged_state_passes_every_check(warm: Path) -> None:
    state = State.open(warm)
    state.check_files()
    assert state.path == warm
    assert state.manifest_bytes == (warm / "manifest.json").read_bytes()
    assert state.trusted_by == ()


@pytest.mark.parametrize("load", [State.open, State.read])
def test_trust_is_checked_before_the_manifest_is_parsed(warm: Path, load: Callable[..., State]) -> None:
    (warm / "manifest.json").chmod(0o644)
    (warm / "manifest.json").write_text("{ not JSON")
    with pytest.raises(IntegrityError, match="is not JSON"):
        load(warm)
    with pytest.raises(IntegrityError, match=f"expected was sha256:{'0' * 64}"):
        load(warm, Trust(expected_digest=f"sha256:{'0' * 64}"))
    with pytest.raises(BadInputError, match="reading the key"):
        load(warm, Trust(key=warm.parent / "missing.pem"))


def test_a_state_remembers_why_it_is_trusted(warm: Path) -> None:
    trust = Trust(expected_digest=f"sha256:{State.read(warm).manifest_digest}")
    state = State.open(warm, trust)
    assert state.trusted_by == trust.check(warm, state.manifest_bytes) != ()


def test_a_start_opens_the_manifest_once(tmp_path: Path) -> None:
    make_state_for(tmp_path / "warm", FITTING, device="cpu", profile="eager")
    record_weights(tmp_path / "weights")
    paths: dict[str, Any] = {name: str(tmp_path / name) for name in ("warm", "weights", "cache")}
    digest = f"sha256:{State.read(tmp_path / 'warm').manifest_digest}"
    report = call("prepare", policy="require", expected_digest=digest, **paths)
    assert report["usable"] == ["numba"]
    assert report["opened"].count("manifest.json") == 1
    assert report["opened"][0] == "manifest.json"


def test_a_directory_without_a_manifest_is_not_a_state(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"has no manifest\.json, so it is not a warm state"):
        State.read(tmp_path)


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(IntegrityError, match="cannot be read"):
        State.read(tmp_path)


def test_the_signature_next_to_a_state_is_found_only_if_it_is_of_this_state(warm: Path) -> None:
    assert State.read(warm).find_signature() is None
    private, _ = make_keys(warm.parent)
    signature = sign(State.open(warm), private)
    assert State.read(warm).find_signature() == signature
    rewrite(warm, lambda raw: raw.update(created="2030-01-01T00:00:00+00:00"))
    with pytest.raises(IntegrityError, match="is of another manifest than"):
        State.read(warm).find_signature()


# ---- the folder and its files


def plant_link(warm: Path) -> None:
    (warm / "numba" / "link").symlink_to("/etc/hostname")


def replace_file_by_link(warm: Path) -> None:
    (warm / CODE).rename(warm.parent / "moved")
    (warm / CODE).symlink_to(warm.parent / "moved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda warm: (warm / "numba" / "extra").write_bytes(b""), "does not list, the first: numba/extra"),
        (lambda warm: (warm / ".hidden").write_bytes(b""), "does not list, the first: .hidden"),
        (lambda warm: (warm / "numba" / "empty").mkdir(), "a folder without files: numba/empty"),
        (plant_link, "link or a special file"),
        (replace_file_by_link, "link or a special file"),
        (lambda warm: (warm / "folder").symlink_to(warm / "numba"), "link or a special file"),
        (lambda warm: os.mkfifo(warm / "numba" / "pipe"), "link or a special file"),
        (lambda warm: (warm / INDEX).chmod(0o664), "can be written by other users"),
        (lambda warm: (warm / INDEX).chmod(0o646), "can be written by other users"),
        (lambda warm: (warm / "manifest.json").chmod(0o666), "can be written by other users"),
        (lambda warm: (warm / "numba" / "librosa" / "deep").chmod(0o775), "can be written by other users"),
        (lambda warm: (warm / "numba" / "librosa").chmod(0o777), "can be written by other users"),
        (lambda warm: (warm / "numba").chmod(0o757), "can be written by other users"),
        (lambda warm: warm.chmod(0o777), "can be written by other users"),
    ],
)
def test_a_folder_that_others_may_have_changed_is_refused(
    warm: Path, change: Callable[[Path], object], message: str
) -> None:
    state = State.read(warm)
    change(warm)
    for check in (state.check_folder, lambda: State.open(warm)):
        with pytest.raises(IntegrityError, match=message):
            check()


def test_check_files_names_every_file_that_differs(warm: Path) -> None:
    state = State.open(warm)
    (warm / CODE).write_bytes(b"machine c0de")
    (warm / INDEX).unlink()
    with pytest.raises(IntegrityError, match=rf"2 file\(s\) of .*{CODE}: sha256 .*{INDEX}: No such file") as caught:
        state.check_files()
    assert caught.value.exit_code == 12


# ---- keys


def changed_key(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Return the key of a state for an H100 after a change of its manifest."""
    make_state_for(tmp_path / "state", H100)
    rewrite(tmp_path / "state", change)
    return State.read(tmp_path / "state").key


def require(raw: dict[str, Any], **facts: str) -> None:
    """Add facts to the requirements of the compiled family."""
    raw["families"][-1]["requires"].update(facts)


def test_a_key_names_the_machine_and_is_a_valid_file_name(tmp_path: Path) -> None:
    gpu = state_key(make_state_for(tmp_path / "gpu", H100))
    assert re.fullmatch(r"cuda-nvidia-h100-80gb-hbm3-cc9\.0-torch2\.6\.0-aot-[0-9a-f]{12}", gpu)
    cpu = state_key(make_state_for(tmp_path / "cpu", {"arch": "x86_64"}, device="cpu", profile="eager"))
    assert re.fullmatch(r"cpu-x86_64-torch2\.6\.0-eager-[0-9a-f]{12}", cpu)
    unusual = state_key(make_state_for(tmp_path / "unusual", {**H100, "gpu": "../Grüße / GPU\n"}))
    assert unusual.startswith("cuda-gr-e-gpu-cc9.0-")


def test_a_key_contains_the_driver_only_if_a_family_depends_on_it(tmp_path: Path) -> None:
    key = state_key(make_state_for(tmp_path / "state", {**H100, "driver": "550.54.15"}))
    assert "-cc9.0-driver550.54.15-torch2.6.0-" in key
    make_state_for(tmp_path / "other", H100)
    rewrite(tmp_path / "other", lambda raw: raw["fingerprint"].update(driver="550.54.15"))
    assert "driver" not in State.read(tmp_path / "other").key


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(created="2030-01-01T00:00:00+00:00", levels=[1], voices=[]),
        lambda raw: raw["weights"].update(set_digest="9" * 64, revision="b" * 40),
        lambda raw: require(raw, weights="9" * 64, cache="/another"),
        lambda raw: require(raw, **{"source:/usr/lib/x.py": "6 bytes, modified at 1.0"}),
        lambda raw: raw["families"].reverse(),
        lambda raw: raw["reference"].update(device="cuda:1", pcm_sha256="f" * 64),
    ],
)
def test_two_bakes_for_the_same_machine_and_software_have_the_same_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    assert changed_key(tmp_path, change) == state_key(make_state_for(tmp_path / "before", H100))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: require(raw, gpu="NVIDIA L4"),
        lambda raw: require(raw, regions="e" * 64),
        lambda raw: require(raw, variant="another"),
        lambda raw: raw["execution"].update(profile="compiled"),
        lambda raw: raw["execution"].update(t3_dtype="bfloat16"),
        lambda raw: raw["execution"].update(graphs=True),
        lambda raw: raw.update(variant="another"),
        lambda raw: raw["fingerprint"].update(torch="2.7.0"),
    ],
)
def test_another_machine_software_or_execution_has_another_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    assert changed_key(tmp_path, change) != state_key(make_state_for(tmp_path / "before", H100))
