"""Test how the facts of a machine are compared with those of a bake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.state.compatibility import current_facts
from chatterbox_prewarm.system.fingerprint import ABSENT, explain

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
