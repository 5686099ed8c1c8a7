"""Test which of several states a machine uses, and that a damaged state does not affect the others."""

from __future__ import annotations

import json
import logging
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.families.registry import applicable
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.usable import usable_families
from chatterbox_prewarm.state.manifest_file import BAKE_AGAIN
from chatterbox_prewarm.state.selection import Request, Selection, select_state, state_path, states_in
from chatterbox_prewarm.state.signature import Trust
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.metrics import StartMetrics
from tests.conftest import run_cli
from tests.helpers.children import call
from tests.helpers.states import FITTING, make_state, make_state_for, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0"}
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
A100 = {"arch": "x86_64", "gpu": "NVIDIA A100", "compute_capability": "8.0"}


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """Write a state for an H100, one for an L4, and one whose manifest is missing."""
    for name, facts in (("h100", H100), ("l4", L4), ("incomplete", A100)):
        make_state_for(tmp_path / "warm" / name, facts)
    (tmp_path / "warm" / "incomplete" / "manifest.json").unlink()
    return tmp_path / "warm"


def select(folder: Path, facts: Mapping[str, str], device: str = "cuda", **request: Any) -> Selection:
    """Select a state for a machine with these facts."""
    return select_state(folder, lambda _: {**facts, "device": device}, Request(device=device, **request))


def damage(state: Path) -> None:
    (state / "extra").write_text("x")


# ---- the states of a folder


def test_a_state_is_the_only_state_of_its_own_folder(tmp_path: Path) -> None:
    warm = tmp_path / "warm"
    make_state(warm, {"numba": {"index.nbi": b"index"}})
    assert states_in(warm) == {"warm": warm}
    assert state_path(warm) == state_path(warm, "warm") == warm


def test_all_visible_folders_next_to_a_state_are_states(tmp_path: Path) -> None:
    make_state_for(tmp_path / "warm" / "b", H100)
    for name in ("a", ".b.staging-1"):
        (tmp_path / "warm" / name).mkdir()
    (tmp_path / "warm" / "README").write_text("x")
    assert list(states_in(tmp_path / "warm")) == ["a", "b"]


def test_a_folder_without_a_manifest_has_no_states(tmp_path: Path) -> None:
    (tmp_path / "warm" / "numba").mkdir(parents=True)
    assert states_in(tmp_path / "warm") == states_in(tmp_path / "nowhere") == states_in(tmp_path / "warm" / "x") == {}
    assert state_path(tmp_path / "warm") == tmp_path / "warm"  # reading it as a state gives the error message


def test_one_of_several_states_must_be_named_and_the_names_are_listed(tmp_path: Path) -> None:
    for name in ("h100", "l4"):
        make_state_for(tmp_path / "warm" / name, H100)
    assert state_path(tmp_path / "warm", "l4") == tmp_path / "warm" / "l4"
    with pytest.raises(BadInputError, match=r"holds 2 states: h100, l4") as caught:
        state_path(tmp_path / "warm")
    assert "--state" in caught.value.next_step
    with pytest.raises(BadInputError, match=r"no state 'a100'; it has: h100, l4"):
        state_path(tmp_path / "warm", "a100")


# ---- the selection


@pytest.mark.parametrize(("facts", "name"), [(H100, "h100"), (L4, "l4")])
def test_a_machine_uses_the_state_that_was_baked_for_it(
    warm: Path, facts: Mapping[str, str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    selection = select(warm, facts, strict=True)
    assert selection.state == State.read(warm / name)
    used, other, incomplete = [record.getMessage() for record in caplog.records]
    assert selection.remarks == (used, other, incomplete)
    assert used == f"the state {name} is used"
    assert f"here {facts['gpu']}" in other
    assert "compute capability: baked with" in other
    assert incomplete.startswith("the state incomplete is left out: ")
    assert "has no manifest.json" in incomplete
    assert selection.unusable == {incomplete: BAKE_AGAIN}


def test_a_selection_contains_the_compatibility_of_its_state(warm: Path) -> None:
    fitting = select(warm, H100).compatibility
    assert (fitting.name, fitting.fits) == ("h100", True)
    assert fitting.differences == {"numba": [], "aot": []}
    assert "signal" in fitting.missing
    assert fitting == State.read(warm / "h100").compatibility({**H100, "device": "cuda"}, device="cuda")
    named = select(warm, H100, name="l4").compatibility
    assert (named.name, named.fits) == ("l4", False)
    assert any("NVIDIA L4" in sentence for sentence in named.differences["aot"])
    single = select(warm / "l4", H100).compatibility
    assert single == named


def test_the_files_of_other_states_are_not_read(warm: Path) -> None:
    (warm / "l4" / "aot" / "region.so").unlink()
    damage(warm / "l4")
    selection = select(warm, H100, strict=True)
    assert selection.state.path == warm / "h100"
    assert not any("extra" in remark for remark in selection.remarks)


def test_the_best_undamaged_state_is_used(warm: Path) -> None:
    make_state_for(warm / "h100-eager", {**H100}, profile="eager")
    damage(warm / "h100")
    selection = select(warm, H100, strict=True)
    assert (selection.state.path.name, selection.compatibility.fits) == ("h100-eager", True)
    assert any("h100 is left out: " in line and "first: extra" in line for line in selection.unusable)


def test_a_link_is_not_a_state(warm: Path, tmp_path: Path) -> None:
    (warm / "h100").rename(tmp_path / "elsewhere")
    (warm / "h100").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FingerprintMismatchError, match=r"h100 is a link"):
        select(warm, H100, strict=True)


def test_if_no_state_fits_every_difference_is_named(warm: Path) -> None:
    with pytest.raises(FingerprintMismatchError) as caught:
        select(warm, A100, strict=True)
    assert caught.value.exit_code == 11
    for part in (
        "h100: aot (GPU compute capability: baked with 9.0, here 8.0; GPU: baked with NVIDIA H100, here NVIDIA A100)",
        "l4: aot (GPU compute capability: baked with 8.9, here 8.0; GPU: baked with NVIDIA L4, here NVIDIA A100)",
        "incomplete: ",
    ):
        assert part in caught.value.message


def test_without_strict_the_state_with_most_fitting_families_is_used(warm: Path) -> None:
    rewrite(warm / "h100", lambda raw: raw["families"][0]["requires"].update(arch="m68k"))
    selection = select(warm, A100)
    assert (selection.state.path.name, selection.compatibility.fits) == ("l4", False)
    assert selection.remarks[0].startswith("the state l4 is used, but only a part fits: aot (GPU compute capability: ")
    assert len(selection.unusable) == 1


def test_if_all_states_are_damaged_the_error_names_each(warm: Path) -> None:
    for name in ("h100", "l4"):
        damage(warm / name)
    with pytest.raises(IntegrityError, match=r"no state of .*h100 is left out.*l4 is left out.*") as caught:
        select(warm, H100)
    assert "incomplete is left out" in caught.value.message


def test_a_folder_of_states_that_others_can_write_is_refused(warm: Path) -> None:
    warm.chmod(0o777)
    with pytest.raises(IntegrityError, match="can be written by other users"):
        select(warm, H100)


def test_only_the_selected_state_must_match_the_trusted_digest(warm: Path) -> None:
    digests = {name: f"sha256:{State.read(warm / name).manifest_digest}" for name in ("h100", "l4")}
    selection = select(warm, H100, trust=Trust(expected_digest=digests["h100"]))
    assert selection.state.path == warm / "h100"
    assert digests["h100"] in selection.state.trusted_by[0]
    with pytest.raises(IntegrityError, match=f"expected was {digests['l4']}"):
        select(warm, H100, trust=Trust(expected_digest=digests["l4"]))


def test_a_state_that_was_baked_without_a_gpu_misses_nothing_on_a_gpu(tmp_path: Path) -> None:
    """It has no cache of the driver. Such a cache may be empty, so a missing one shows no miss."""
    families = {name: {"file": b"x"} for name in ("bytecode", "numba", "signal", "conditionals")}
    make_state(tmp_path / "warm", families)
    metrics = StartMetrics()
    wanted = applicable("eager", "cuda")
    assert "cuda" in wanted
    warm = tmp_path / "warm"
    options = StartOptions(warm=warm, weights=tmp_path, cache=tmp_path, device="cuda", policy="require")
    usable = usable_families(select(warm, FITTING), wanted, options, metrics)
    assert set(usable) == set(families)
    assert not metrics.misses


def settings(profile: str = "aot", device: str = "cuda", code: bytes = b"code") -> dict[str, Any]:
    """Return arguments of `make_state_for`."""
    return {"profile": profile, "device": device, "code": code}


@pytest.mark.parametrize(
    ("states", "profile", "name", "reason"),
    [
        (
            {"a": settings("eager"), "b": settings("aot")},
            None,
            "b",
            "the other state has more compiled code that fits",
        ),
        (
            {"a": settings(code=b"1"), "b": settings(code=b"22")},
            None,
            "b",
            "the other state has more compiled code that fits",
        ),
        ({"b": settings(), "a": settings()}, None, "a", "the name of the other state comes first"),
        (
            {"a": settings("aot"), "b": settings("eager")},
            "eager",
            "b",
            "it has another profile than requested",
        ),
        ({"a": settings(device="cpu"), "b": settings("eager")}, None, "b", "device: baked for cpu, here cuda"),
    ],
)
def test_states_that_fit_are_ranked_and_the_reason_is_given(
    tmp_path: Path, states: dict[str, dict[str, Any]], profile: str | None, name: str, reason: str
) -> None:
    for key, arguments in states.items():
        make_state_for(tmp_path / "warm" / key, H100, **arguments)
    selection = select(tmp_path / "warm", H100, profile=profile, strict=True)
    assert selection.state.path.name == name
    assert selection.remarks[0] == f"the state {name} is used"
    assert reason in selection.remarks[1]


def test_without_a_device_each_state_is_compared_for_the_device_it_was_baked_for(tmp_path: Path) -> None:
    make_state_for(tmp_path / "warm" / "cpu", {"arch": "x86_64"}, device="cpu")
    make_state_for(tmp_path / "warm" / "gpu", H100)

    def facts(state: State) -> dict[str, str]:
        return {"arch": "x86_64", "device": state.manifest.reference.device}

    assert select_state(tmp_path / "warm", facts, Request(strict=True)).state.path.name == "cpu"


def test_a_state_for_another_variant_is_never_used(warm: Path) -> None:
    rewrite(warm / "h100", lambda raw: raw.update(variant="multilingual"))
    assert select(warm, H100).state.path == warm / "h100", "these facts do not tell the variant of the weights"
    english = select(warm, {**H100, "variant": "english"})
    assert english.state.path == warm / "l4"
    assert not any("h100" in line for line in english.unusable), "a server may have the state of another model"
    assert select(warm, {**L4, "variant": "multilingual"}).state.path == warm / "h100"
    for only in (warm / "h100", warm):
        with pytest.raises(FingerprintMismatchError, match="is for the model variant multilingual"):
            select(only, {**H100, "variant": "english"}, **({"name": "h100"} if only == warm else {}))
    rewrite(warm / "l4", lambda raw: raw.update(variant="multilingual"))
    shutil.rmtree(warm / "incomplete")
    with pytest.raises(FingerprintMismatchError, match="is for the model variant multilingual"):
        select(warm, {**H100, "variant": "english"})


def test_a_named_state_is_used_even_if_it_does_not_fit(warm: Path) -> None:
    assert select(warm, H100, name="l4", strict=True).state.path == warm / "l4"
    with pytest.raises(BadInputError, match="no state 'a100'"):
        select(warm, H100, name="a100")


# ---- a start


def prepare(tmp_path: Path, policy: str) -> dict[str, Any]:
    """Run `prepare` in another process, and return its report."""
    record_weights(tmp_path / "weights")
    warm, weights, cache = (str(tmp_path / name) for name in ("warm", "weights", "cache"))
    return call("prepare", policy=policy, warm=warm, weights=weights, cache=cache)


def make_two_states(tmp_path: Path, other: Mapping[str, str]) -> Path:
    """Write a state for this machine without compiled code, and a compiled one for a machine with the facts `other`."""
    make_state_for(tmp_path / "warm" / "here", FITTING, device="cpu", profile="eager")
    make_state_for(tmp_path / "warm" / "other", other, device="cpu", profile="aot")
    return tmp_path / "warm"


@pytest.mark.parametrize("policy", ["require", "fallback"])
@pytest.mark.parametrize("damage_state", [damage, lambda state: (state / "manifest.json").unlink()])
def test_a_start_uses_the_fitting_state_and_a_damaged_one_is_not_a_miss(
    tmp_path: Path, policy: str, damage_state: Callable[[Path], object]
) -> None:
    warm = make_two_states(tmp_path, FITTING)
    damage_state(warm / "other")
    report = prepare(tmp_path, policy)
    assert report["usable"] == ["numba"]
    assert report["metrics"]["state"] == State.read(warm / "here").key
    assert not {"states", "all", "numba"} & set(report["metrics"]["misses"])
    assert (tmp_path / "cache" / "numba" / "librosa" / "filters.nbi").read_bytes() == b"index"


def test_a_strict_start_exits_with_11_if_no_state_fits(tmp_path: Path) -> None:
    warm = make_two_states(tmp_path, {"arch": "m68k"})
    rewrite(warm / "here", lambda raw: raw["families"][0]["requires"].update(arch="vax"))
    with pytest.raises(FingerprintMismatchError, match=r"here: numba \(.*vax.* \| other: numba \(.*m68k"):
        prepare(tmp_path, "require")


def test_under_fallback_a_start_counts_unfitting_families_and_damaged_states(tmp_path: Path) -> None:
    warm = make_two_states(tmp_path, FITTING)
    rewrite(warm / "here", lambda raw: raw["families"][0]["requires"].update(arch="vax"))
    damage(warm / "other")
    report = prepare(tmp_path, "fallback")
    misses = report["metrics"]["misses"]
    assert (report["usable"], misses["numba"], misses["states"]) == ([], 1, 1)


def test_a_start_is_cold_if_all_states_are_damaged(tmp_path: Path) -> None:
    warm = make_two_states(tmp_path, FITTING)
    for name in ("here", "other"):
        damage(warm / name)
    report = prepare(tmp_path, "fallback")
    metrics = report["metrics"]
    assert (report["has_manifest"], metrics["misses"], metrics["state"]) == (False, {"all": 1}, "")
    with pytest.raises(IntegrityError, match="other is left out"):
        prepare(tmp_path, "require")


# ---- the command line


def test_pack_needs_the_name_of_one_of_several_states_and_uses_its_key_as_folder(warm: Path, tmp_path: Path) -> None:
    refused = run_cli("pack", "--warm", warm, "--output", tmp_path / "layer.tar.gz")
    assert refused.returncode == 16
    assert "h100, incomplete, l4" in refused.stderr
    packed = run_cli("pack", "--warm", warm, "--state", "l4", "--output", tmp_path / "layer.tar.gz")
    assert packed.returncode == 0, packed.stderr
    key = State.read(warm / "l4").key
    with tarfile.open(tmp_path / "layer.tar.gz") as layer:
        assert f"opt/chatterbox-prewarm/warm/{key}/manifest.json" in layer.getnames()
        modes = {entry.name: entry.mode for entry in layer}
    assert modes["opt/chatterbox-prewarm/warm"] == 0o755


def test_inspect_lists_several_states_and_shows_a_named_one(warm: Path) -> None:
    listed = run_cli("inspect", "--warm", warm)
    assert listed.returncode == 0, listed.stderr
    h100, incomplete, l4 = listed.stdout.splitlines()
    assert h100.startswith("h100: cuda-nvidia-h100-cc9.0-")
    assert l4.startswith("l4: cuda-nvidia-l4-")
    assert incomplete.startswith("incomplete: cannot be used: ")
    shown = run_cli("inspect", "--warm", warm, "--state", "l4")
    assert f"  key {State.read(warm / 'l4').key}" in shown.stdout
    document = json.loads(run_cli("inspect", "--warm", warm, "--json").stdout)
    assert list(document["states"].values()) == [h100, incomplete, l4]


def test_verify_checks_the_state_that_a_start_here_uses(tmp_path: Path) -> None:
    warm = make_two_states(tmp_path, {"arch": "m68k"})
    record_weights(tmp_path / "weights")
    options = ("--warm", warm, "--weights", tmp_path / "weights", "--cache", tmp_path / "cache")
    verified = run_cli("verify", *options)
    assert verified.returncode == 0, verified.stderr
    lines = verified.stdout.splitlines()
    assert lines[0] == "the state here is used"
    assert lines[1].startswith("the state other is left out: numba (processor architecture: baked with m68k, here ")
    assert "numba: 1 file(s) intact, fits this machine" in lines
    refused = run_cli("verify", *options, "--state", "other")
    assert refused.returncode == 11
    damage(warm / "other")
    assert run_cli("verify", *options).returncode == 0
    assert run_cli("verify", *options, "--state", "other").returncode == 12


def test_prove_refuses_states_that_do_not_fit_before_it_isolates_a_process(warm: Path, tmp_path: Path) -> None:
    record_weights(tmp_path / "weights")
    refused = run_cli("prove", "--warm", warm, "--weights", tmp_path / "weights")
    assert refused.returncode == 11, refused.stderr
    assert "no state of" in refused.stderr
