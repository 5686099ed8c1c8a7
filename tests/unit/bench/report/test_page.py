"""Test the page of a report: its numbers, its charts, and that incomplete results are marked."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from chatterbox_prewarm import generate_warmup_report
from chatterbox_prewarm.bench.report.charts import draw
from chatterbox_prewarm.bench.report.sections import sections
from chatterbox_prewarm.errors import BadInputError
from tests.helpers.reports import results

if TYPE_CHECKING:
    from pathlib import Path

CHARTS = {"starts", "chunks", "levels", "ablation", "profiles", "growth", "load"}


def test_the_page_contains_its_charts_and_its_audio(tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir()
    for name in ("upstream", "cold", "warm"):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.zeros(240), 24_000)
    page = generate_warmup_report(results(), str(tmp_path))
    assert page == tmp_path / "report.html"
    text = page.read_text(encoding="utf-8")
    assert {path.stem for path in tmp_path.glob("*.png")} == CHARTS
    for name in CHARTS:
        image = (tmp_path / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert base64.b64encode(image).decode() in text
    assert text.count("<audio") == 4, "two pairs"
    assert re.findall(r'(?:src|href)="(?!data:)', text) == [], "the page needs no other file"
    assert "68% less" in text
    assert "not complete" not in text


def test_incomplete_results_are_marked(tmp_path: Path) -> None:
    steps = {"levels: 0": results()["steps"]["levels: 0"]}
    content = results(steps=steps, complete=False, failed={"levels: 1": "the process <b> ended"})
    text = generate_warmup_report(content, tmp_path).read_text(encoding="utf-8")
    assert "This report is not complete" in text
    assert "levels: 1: the process &lt;b&gt; ended" in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {"levels"}
    assert text.count("not measured") == 7 + 6, "claims and budgets"


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    pages = [generate_warmup_report(results(), tmp_path / name).read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_the_sections_have_the_measured_values() -> None:
    found = {section.title: {row[0]: row[1:] for row in section.rows} for section in sections(results()["steps"])}
    assert found["Start of a server"]["ours, warm"] == ("1.52", "3.05", "4.05", "10.00", "1.00")
    assert found["Requests"]["upstream"] == ("4.50", "", "9.00", "4.00", "2500", "20.00")
    assert found["What each family saves"] == {"numba": ("8.00", "2.3"), "signal": ("0.00", "0.3")}
    assert found["Memory pressure"]["100 %, 2500 MB"] == ("spoke 2 requests",)
    assert found["Memory pressure"]["90 %, 2250 MB"] == ("ended with exit code 15: the process ran out of memory",)
    assert found["Growth"]["resident memory for each additional worker"] == ("1500.00 MB",)
    assert found["Quality in pairs"]["cold / warm"] == ("100%", "0.0000", "all equal")


def test_no_chart_is_drawn_without_results() -> None:
    assert draw({}) == {}
    assert sections({}) == []


@pytest.mark.parametrize("content", [None, {}, {"steps": {}}, "results.json"])
def test_something_else_than_results_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not the results of a report"):
        generate_warmup_report(content, tmp_path / "out")
    assert not (tmp_path / "out").exists()
