"""Test the text that describes the differences of two states."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.state.state_diff import differences
from tests.conftest import run_cli
from tests.helpers.states import make_state, make_state_for, rewrite

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

FEATURES = " ".join(f"feature{number}" for number in range(20))

GOLDEN = """\
weights: repository: someone/voice → own
weights: set digest: 2222222222222222222222222222222222222222222222222222222222222222 → \
3333333333333333333333333333333333333333333333333333333333333333
variant: english → another
execution: profile: eager → aot
execution: graphs: False → True
processor architecture: x86_64 → aarch64
CPU features: ... old → ... new
Python: cpython-311 3.11.7 → absent
torch: absent → 2.6.0
numba: bytes: 10 → 26
numba: files: 1 removed: numba/a
numba: files: 4 added: numba/e, numba/f, numba/g, ...
numba: files: 1 changed: numba/b
numba: requires processor architecture: x86_64 → aarch64
numba: requires driver of another: absent → 1
signal: only in the first state, 2 bytes
aot: only in the second state, 6 bytes
voices: 1 removed: second
voices: 2 added: fox, third
reference: device: cpu → cuda
reference: pcm_sha256: 1111111111111111111111111111111111111111111111111111111111111111 → \
9999999999999999999999999999999999999999999999999999999999999999
"""


def make_two_states(tmp_path: Path) -> tuple[Path, Path]:
    """Write two states that differ in every compared property."""
    one, other = tmp_path / "one", tmp_path / "other"
    fitting = {"arch": "x86_64"}
    make_state(
        one,
        {"numba": {"a": b"1234", "b": b"1234", "c": b"12"}, "signal": {"s": b"12"}},
        {"numba": fitting, "signal": fitting},
    )
    rewrite(one, lambda raw: raw["fingerprint"].update(cpu_features=f"{FEATURES} old"))
    make_state(
        other,
        {"numba": {"b": b"4321", "c": b"12", **dict.fromkeys("efgh", b"12345")}, "aot": {"x.so": b"123456"}},
        {"numba": {"arch": "aarch64", "driver of another": "1"}, "aot": fitting},
    )

    def change(raw: dict[str, Any]) -> None:
        raw["weights"].update(repository="own", set_digest="3" * 64)
        raw["execution"].update(profile="aot", graphs=True)
        raw["fingerprint"] = {"arch": "aarch64", "cpu_features": f"{FEATURES} new", "torch": "2.6.0"}
        raw["reference"].update(device="cuda", pcm_sha256="9" * 64)
        raw.update(variant="another", voices=["default", "fox", "third"], created="2030-01-01T00:00:00+00:00")

    rewrite(other, change)
    return one, other


def test_every_difference_is_listed_in_a_fixed_order(tmp_path: Path) -> None:
    one, other = make_two_states(tmp_path)
    shown = run_cli("inspect", "--diff", one, other)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == GOLDEN
    assert "\n".join(differences(State.read(one).manifest, State.read(other).manifest)) + "\n" == GOLDEN


def test_the_time_version_and_levels_of_a_bake_are_not_differences(tmp_path: Path) -> None:
    one, _ = make_two_states(tmp_path)
    manifest = State.read(one).manifest
    later = replace(manifest, created="2030-01-01T00:00:00+00:00", tool="chatterbox-prewarm 9", levels=(1,))
    assert differences(manifest, later) == []
    shown = run_cli("inspect", "--diff", one, one)
    assert (shown.returncode, shown.stdout) == (0, "no difference\n")


def test_a_folder_of_several_states_cannot_be_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_state_for(tmp_path / "warm" / name, {"arch": name})
    refused = run_cli("inspect", "--diff", tmp_path / "warm", tmp_path / "warm" / "a")
    assert refused.returncode == 16
    assert "holds 2 states: a, b" in refused.stderr
    shown = run_cli("inspect", "--diff", tmp_path / "warm" / "a", tmp_path / "warm" / "b")
    assert "aot: requires processor architecture: a → b" in shown.stdout
