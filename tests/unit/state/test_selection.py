"""Which of several states a machine takes: by fit, then by what is compiled; a broken one hurts nobody."""

from __future__ import annotations

import logging
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.state.folder import key_of
from chatterbox_prewarm.state.manifest import Manifest, read_manifest
from chatterbox_prewarm.state.selection import Choice, choose
from tests.conftest import run_cli
from tests.helpers.children import call
from tests.helpers.states import FITTING, make_state_for, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0"}
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
A100 = {"arch": "x86_64", "gpu": "NVIDIA A100", "compute_capability": "8.0"}


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """States for an H100 and for an L4, and one that lost its manifest."""
    for name, facts in (("h100", H100), ("l4", L4), ("lost", A100)):
        make_state_for(tmp_path / "warm" / name, facts)
    (tmp_path / "warm" / "lost" / "manifest.json").unlink()
    return tmp_path / "warm"


def take(warm: Path, facts: Mapping[str, str], device: str = "cuda", **options: Any) -> Choice:
    return choose(warm, lambda _: {**facts, "device": device}, device=device, **options)


def damage(state: Path) -> None:
    (state / "extra").write_text("x")


@pytest.mark.parametrize(("facts", "name"), [(H100, "h100"), (L4, "l4")])
def test_a_machine_takes_the_state_that_was_baked_for_it(
    warm: Path, facts: Mapping[str, str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chosen = take(warm, facts, strict=True)
    assert (chosen.path, chosen.manifest, chosen.fits) == (warm / name, read_manifest(warm / name), True)
    taken, other, lost = [record.getMessage() for record in caplog.records]
    assert chosen.remarks == (taken, other, lost)
    assert taken == f"the state {name} is taken"
    assert f"here {facts['gpu']}" in other
    assert "compute capability: baked with" in other
    assert lost.startswith("the state lost is left out: ")
    assert "holds no manifest.json" in lost


def test_the_files_of_a_state_that_is_not_taken_are_never_looked_at(warm: Path) -> None:
    (warm / "l4" / "aot" / "region.so").unlink()
    damage(warm / "l4")
    chosen = take(warm, H100, strict=True)
    assert chosen.path == warm / "h100"
    assert not any("extra" in remark for remark in chosen.remarks)


def test_the_best_that_is_not_broken_is_taken(warm: Path) -> None:
    make_state_for(warm / "h100-eager", {**H100}, profile="eager")
    damage(warm / "h100")
    chosen = take(warm, H100, strict=True)
    assert (chosen.path.name, chosen.fits) == ("h100-eager", True)
    assert any("h100 is left out: " in words and "first: extra" in words for words in chosen.broken)


def test_a_link_is_no_state(warm: Path, tmp_path: Path) -> None:
    (warm / "h100").rename(tmp_path / "elsewhere")
    (warm / "h100").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FingerprintMismatchError, match=r"h100 is a link"):
        take(warm, H100, strict=True)


def test_where_none_fits_each_difference_is_named(warm: Path) -> None:
    with pytest.raises(FingerprintMismatchError) as caught:
        take(warm, A100, strict=True)
    assert caught.value.exit_code == 11
    for words in (
        "h100: aot (GPU compute capability: baked with 9.0, here 8.0; GPU: baked with NVIDIA H100, here NVIDIA A100)",
        "l4: aot (GPU compute capability: baked with 8.9, here 8.0; GPU: baked with NVIDIA L4, here NVIDIA A100)",
        "lost: ",
    ):
        assert words in caught.value.message


def test_where_none_fits_the_one_that_fits_most_is_taken_by_a_start_that_may_go_on(warm: Path) -> None:
    rewrite(warm / "h100", lambda raw: raw["families"][0]["requires"].update(arch="m68k"))
    chosen = take(warm, A100)
    assert (chosen.path.name, chosen.fits) == ("l4", False)
    assert chosen.remarks[0].startswith("the state l4 is taken, which fits in part: aot (GPU compute capability: ")
    assert len(chosen.broken) == 1


def test_states_that_are_all_broken_are_an_integrity_error(warm: Path) -> None:
    for name in ("h100", "l4"):
        damage(warm / name)
    with pytest.raises(IntegrityError, match=r"no state of .*h100 is left out.*l4 is left out.*") as caught:
        take(warm, H100)
    assert "lost is left out" in caught.value.message


def test_a_folder_of_states_that_others_can_write_is_refused(warm: Path) -> None:
    warm.chmod(0o777)
    with pytest.raises(IntegrityError, match="can be written by other users"):
        take(warm, H100)


def shape(profile: str = "aot", device: str = "cuda", code: bytes = b"code") -> dict[str, Any]:
    return {"profile": profile, "device": device, "code": code}


@pytest.mark.parametrize(
    ("states", "asked", "name", "why"),
    [
        ({"a": shape("eager"), "b": shape("aot")}, None, "b", "the other has more that is compiled"),
        ({"a": shape(code=b"1"), "b": shape(code=b"22")}, None, "b", "the other has more that is compiled"),
        ({"b": shape(), "a": shape()}, None, "a", "the other's name comes first"),
        ({"a": shape("aot"), "b": shape("eager")}, "eager", "b", "it has another profile than asked for"),
        ({"a": shape(device="cpu"), "b": shape("eager")}, None, "b", "device: baked for cpu, here cuda"),
    ],
)
def test_among_those_that_fit_the_order_is_stated(
    tmp_path: Path, states: dict[str, dict[str, Any]], asked: str | None, name: str, why: str
) -> None:
    for key, settings in states.items():
        make_state_for(tmp_path / "warm" / key, H100, **settings)
    chosen = take(tmp_path / "warm", H100, profile=asked, strict=True)
    assert chosen.path.name == name
    assert chosen.remarks[0] == f"the state {name} is taken"
    assert why in chosen.remarks[1]


def test_without_a_device_each_state_is_judged_for_its_own(tmp_path: Path) -> None:
    make_state_for(tmp_path / "warm" / "cpu", {"arch": "x86_64"}, device="cpu")
    make_state_for(tmp_path / "warm" / "gpu", H100)

    def facts(manifest: Manifest) -> dict[str, str]:
        return {"arch": "x86_64", "device": manifest.reference.device}

    assert choose(tmp_path / "warm", facts, strict=True).path.name == "cpu"


def test_a_state_that_is_named_is_taken_whether_it_fits_or_not(warm: Path) -> None:
    assert take(warm, H100, name="l4", strict=True).path == warm / "l4"
    with pytest.raises(BadInputError, match="no state 'a100'"):
        take(warm, H100, name="a100")


# ---- a start


def prepare(tmp_path: Path, policy: str) -> dict[str, Any]:
    record_weights(tmp_path / "weights")
    warm, weights, cache = (str(tmp_path / name) for name in ("warm", "weights", "cache"))
    return call("prepare", policy=policy, warm=warm, weights=weights, cache=cache)


def both(tmp_path: Path, other: Mapping[str, str]) -> Path:
    """A state for this machine that compiles nothing, and one for another."""
    make_state_for(tmp_path / "warm" / "here", FITTING, device="cpu", profile="eager")
    make_state_for(tmp_path / "warm" / "other", other, device="cpu", profile="aot")
    return tmp_path / "warm"


@pytest.mark.parametrize("policy", ["require", "fallback"])
@pytest.mark.parametrize("hurt", [damage, lambda state: (state / "manifest.json").unlink()])
def test_a_start_uses_the_state_that_fits_and_a_broken_one_counts_no_miss(
    tmp_path: Path, policy: str, hurt: Callable[[Path], object]
) -> None:
    warm = both(tmp_path, FITTING)
    hurt(warm / "other")
    seen = prepare(tmp_path, policy)
    assert seen["usable"] == ["numba"]
    assert seen["metrics"]["state"] == key_of(read_manifest(warm / "here"))
    assert not {"states", "all", "numba"} & set(seen["metrics"]["misses"])
    assert (tmp_path / "cache" / "numba" / "librosa" / "filters.nbi").read_bytes() == b"index"


def test_a_start_that_needs_a_fit_ends_with_11_where_none_fits(tmp_path: Path) -> None:
    warm = both(tmp_path, {"arch": "m68k"})
    rewrite(warm / "here", lambda raw: raw["families"][0]["requires"].update(arch="vax"))
    with pytest.raises(FingerprintMismatchError, match=r"here: numba \(.*vax.* \| other: numba \(.*m68k"):
        prepare(tmp_path, "require")


def test_a_start_that_goes_on_without_a_fit_counts_what_is_left_out_and_what_is_broken(tmp_path: Path) -> None:
    warm = both(tmp_path, FITTING)
    rewrite(warm / "here", lambda raw: raw["families"][0]["requires"].update(arch="vax"))
    damage(warm / "other")
    seen = prepare(tmp_path, "fallback")
    misses = seen["metrics"]["misses"]
    assert (seen["usable"], misses["numba"], misses["states"]) == ([], 1, 1)


def test_a_start_without_any_whole_state_is_cold(tmp_path: Path) -> None:
    warm = both(tmp_path, FITTING)
    for name in ("here", "other"):
        damage(warm / name)
    seen = prepare(tmp_path, "fallback")
    assert (seen["has_manifest"], seen["metrics"]["misses"], seen["metrics"]["state"]) == (False, {"all": 1}, "")
    with pytest.raises(IntegrityError, match="other is left out"):
        prepare(tmp_path, "require")


# ---- the command line


def test_pack_wants_the_name_of_one_of_several_and_gives_it_a_folder_of_its_own(warm: Path, tmp_path: Path) -> None:
    refused = run_cli("pack", "--warm", warm, "--output", tmp_path / "layer.tar.gz")
    assert refused.returncode == 16
    assert "h100, l4, lost" in refused.stderr
    packed = run_cli("pack", "--warm", warm, "--state", "l4", "--output", tmp_path / "layer.tar.gz")
    assert packed.returncode == 0, packed.stderr
    key = key_of(read_manifest(warm / "l4"))
    with tarfile.open(tmp_path / "layer.tar.gz") as layer:
        assert f"opt/chatterbox-prewarm/warm/{key}/manifest.json" in layer.getnames()
        tar = {entry.name: entry.mode for entry in layer}
    assert tar["opt/chatterbox-prewarm/warm"] == 0o755


def test_inspect_lists_several_and_shows_one(warm: Path) -> None:
    listed = run_cli("inspect", "--warm", warm)
    assert listed.returncode == 0, listed.stderr
    h100, l4, lost = listed.stdout.splitlines()
    assert h100.startswith("h100: cuda-nvidia-h100-cc9.0-")
    assert l4.startswith("l4: cuda-nvidia-l4-")
    assert lost.startswith("lost: cannot be used: ")
    shown = run_cli("inspect", "--warm", warm, "--state", "l4")
    assert f"  key {key_of(read_manifest(warm / 'l4'))}" in shown.stdout
    assert run_cli("inspect", "--warm", warm, "--json").returncode == 16


def test_verify_checks_the_state_that_a_start_here_would_take(tmp_path: Path) -> None:
    warm = both(tmp_path, {"arch": "m68k"})
    record_weights(tmp_path / "weights")
    places = ("--warm", warm, "--weights", tmp_path / "weights", "--cache", tmp_path / "cache")
    verified = run_cli("verify", *places)
    assert verified.returncode == 0, verified.stderr
    lines = verified.stdout.splitlines()
    assert lines[0] == "the state here is taken"
    assert lines[1].startswith("the state other is left out: numba (processor architecture: baked with m68k, here ")
    assert "numba: 1 file(s) intact, fits this machine" in lines
    refused = run_cli("verify", *places, "--state", "other")
    assert refused.returncode == 11
    damage(warm / "other")
    assert run_cli("verify", *places).returncode == 0
    assert run_cli("verify", *places, "--state", "other").returncode == 12


def test_a_proof_where_no_state_fits_says_so_before_it_sets_a_process_apart(warm: Path, tmp_path: Path) -> None:
    record_weights(tmp_path / "weights")
    refused = run_cli("prove", "--warm", warm, "--weights", tmp_path / "weights")
    assert refused.returncode == 11, refused.stderr
    assert "no state of" in refused.stderr
