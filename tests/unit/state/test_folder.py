"""States side by side: their keys, and how they are found and named in a folder."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.folder import key_of, named, states_in
from chatterbox_prewarm.state.manifest import read_manifest
from tests.helpers.states import make_state, make_state_for, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

H100 = {"arch": "x86_64", "gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "torch": "2.6.0"}


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The key of a state for an H100 after a change of its manifest."""
    make_state_for(tmp_path / "state", H100)
    rewrite(tmp_path / "state", change)
    return key_of(read_manifest(tmp_path / "state"))


def test_a_key_reads_as_what_the_state_is_for_and_is_fit_for_a_file_name(tmp_path: Path) -> None:
    gpu = key_of(make_state_for(tmp_path / "gpu", H100))
    assert re.fullmatch(r"cuda-nvidia-h100-80gb-hbm3-cc9\.0-torch2\.6\.0-aot-[0-9a-f]{12}", gpu)
    cpu = key_of(make_state_for(tmp_path / "cpu", {"arch": "x86_64"}, device="cpu", profile="eager"))
    assert re.fullmatch(r"cpu-x86_64-torch2\.6\.0-eager-[0-9a-f]{12}", cpu)
    odd = key_of(make_state_for(tmp_path / "odd", {**H100, "gpu": "../Grüße / GPU\n"}))
    assert odd.startswith("cuda-gr-e-gpu-cc9.0-")


def test_a_driver_is_in_the_key_if_a_family_depends_on_it(tmp_path: Path) -> None:
    key = key_of(make_state_for(tmp_path / "state", {**H100, "driver": "550.54.15"}))
    assert "-cc9.0-driver550.54.15-torch2.6.0-" in key
    make_state_for(tmp_path / "other", H100)
    rewrite(tmp_path / "other", lambda raw: raw["fingerprint"].update(driver="550.54.15"))
    assert "driver" not in key_of(read_manifest(tmp_path / "other"))


def _requires(raw: dict[str, Any], **facts: str) -> None:
    raw["families"][-1]["requires"].update(facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(created="2030-01-01T00:00:00+00:00", levels=[1], voices=[]),
        lambda raw: raw["weights"].update(set_digest="9" * 64, revision="b" * 40),
        lambda raw: _requires(raw, weights="9" * 64, cache="/another"),
        lambda raw: _requires(raw, **{"source:/usr/lib/x.py": "6 bytes, modified at 1.0"}),
        lambda raw: raw["families"].reverse(),
        lambda raw: raw["reference"].update(device="cuda:1", pcm_sha256="f" * 64),
    ],
)
def test_two_bakes_for_one_machine_and_software_have_one_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    assert changed(tmp_path, change) == key_of(make_state_for(tmp_path / "before", H100))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: _requires(raw, gpu="NVIDIA L4"),
        lambda raw: _requires(raw, regions="e" * 64),
        lambda raw: _requires(raw, variant="another"),
        lambda raw: raw["execution"].update(profile="compiled"),
        lambda raw: raw["execution"].update(t3_dtype="bfloat16"),
        lambda raw: raw["execution"].update(graphs=True),
        lambda raw: raw.update(variant="another"),
        lambda raw: raw["fingerprint"].update(torch="2.7.0"),
    ],
)
def test_another_machine_software_or_way_of_executing_has_another_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    assert changed(tmp_path, change) != key_of(make_state_for(tmp_path / "before", H100))


def test_a_state_is_the_only_one_of_its_own_folder(tmp_path: Path) -> None:
    make_state(tmp_path / "warm", {"numba": {"index.nbi": b"index"}})
    assert states_in(tmp_path / "warm") == {"warm": tmp_path / "warm"}
    assert named(tmp_path / "warm", None) == named(tmp_path / "warm", "warm") == tmp_path / "warm"


def test_folders_beside_a_state_are_states_too_unless_they_are_hidden(tmp_path: Path) -> None:
    make_state_for(tmp_path / "warm" / "b", H100)
    for name in ("a", ".b.staging-1"):
        (tmp_path / "warm" / name).mkdir()
    (tmp_path / "warm" / "README").write_text("x")
    assert list(states_in(tmp_path / "warm")) == ["a", "b"]


def test_a_folder_without_any_state_holds_none(tmp_path: Path) -> None:
    (tmp_path / "warm" / "numba").mkdir(parents=True)
    assert states_in(tmp_path / "warm") == states_in(tmp_path / "nowhere") == states_in(tmp_path / "warm" / "x") == {}
    assert named(tmp_path / "warm", None) == tmp_path / "warm"  # whose reading says what is wrong


def test_one_of_several_has_to_be_named_and_the_names_are_listed(tmp_path: Path) -> None:
    for name in ("h100", "l4"):
        make_state_for(tmp_path / "warm" / name, H100)
    assert named(tmp_path / "warm", "l4") == tmp_path / "warm" / "l4"
    with pytest.raises(BadInputError, match=r"holds 2 states: h100, l4") as caught:
        named(tmp_path / "warm", None)
    assert "--state" in caught.value.next_step
    with pytest.raises(BadInputError, match=r"no state 'a100'; it holds: h100, l4"):
        named(tmp_path / "warm", "a100")
