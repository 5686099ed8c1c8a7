"""The pictures of the documentation are small, are shown with a description, and agree with the recorded results."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bench.report.figures import extra_seconds
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PICTURES = sorted((ROOT / "docs").glob("*.png"))


def description(picture: str, page: Path) -> str:
    """Return the description of a picture on a page."""
    (found,) = re.findall(rf"!\[([^\]]+)\]\((?:docs/)?{re.escape(picture)}\)", page.read_text(encoding="utf-8"))
    return str(found)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: str(path.name))
def test_a_picture_is_a_small_png(picture: Path) -> None:
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert len(content) < 150_000


def test_each_picture_is_described_on_its_page() -> None:
    pages = {
        "starts.png": ROOT / "README.md",
        "ablation.png": ROOT / "docs" / "families.md",
        "page.png": ROOT / "docs" / "serving.md",
    }
    assert set(pages) == {path.name for path in PICTURES}
    for picture, page in pages.items():
        assert len(description(picture, page).split()) > 10


def test_the_description_of_the_ablation_has_the_recorded_seconds() -> None:
    steps = json.loads((ROOT / "benchmarks" / "results" / "report-cpu.json").read_text(encoding="utf-8"))["steps"]
    text = description("ablation.png", ROOT / "docs" / "families.md")
    shown = {name: float(seconds) for name, seconds in re.findall(r"(\w+) (\d+\.\d)", text)}
    saved = {name: seconds for name, (seconds, _) in extra_seconds(steps).items() if seconds > 1}
    assert shown == {name: round(seconds, 1) for name, seconds in saved.items()}
