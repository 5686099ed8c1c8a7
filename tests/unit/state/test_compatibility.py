"""Test how the facts of a machine are compared with those of a bake."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.families.registry import applicable
from chatterbox_prewarm.state.compatibility import compare_families, current_facts
from chatterbox_prewarm.system.fingerprint import ABSENT, explain
from tests.helpers.states import make_state

if TYPE_CHECKING:
    from pathlib import Path


def test_a_source_file_is_compared_by_size_and_time(tmp_path: Path) -> None:
    source = tmp_path / "filters.py"
    source.write_text("x = 1\n")
    key = f"source:{source}"
    before = current_facts([key, "arch", "gpu"], {"arch": "x86_64"})
    assert before["arch"] == "x86_64"
    assert before["gpu"] == ABSENT
    assert before[key].startswith("6 bytes, modified at ")
    source.write_text("x = 10\n")
    after = current_facts([key], {})
    assert explain({key: before[key]}, after) == [f"source file {source}: baked with {before[key]}, here {after[key]}"]
    source.unlink()
    assert current_facts([key], {}) == {key: ABSENT}


@pytest.mark.usefixtures("lean_installation")
def test_a_lean_installation_compares_only_what_it_uses(tmp_path: Path) -> None:
    """It has neither Numba nor transformers nor chatterbox, and no family that depends on them alone."""
    assert applicable("eager", "cpu") == ("bytecode", "conditionals")
    requirements = {
        "bytecode": {"python": "3.11", "transformers": "5.2.0", "chatterbox": "0" * 64},
        "conditionals": {"weights": "1" * 64, "chatterbox": "0" * 64},
        "numba": {"arch": "x86_64", "numba": "0.61"},
        "signal": {"librosa": "0.11"},
    }
    facts = {"python": "3.11", "weights": "2" * 64, "arch": "arm64"}
    manifest = make_state(tmp_path / "warm", {name: {"file": b"x"} for name in requirements}, requirements)
    assert compare_families(manifest, facts) == {
        "bytecode": [],
        "conditionals": [f"weights: baked with {'1' * 64}, here {'2' * 64}"],
    }
