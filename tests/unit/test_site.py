"""The documentation site builds without a warning, and a broken page would be noticed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def build(checkout: Path) -> subprocess.CompletedProcess[str]:
    if not MKDOCS.exists():
        pytest.skip("mkdocs is not installed; run `make docs`")
    return subprocess.run([MKDOCS, "build", "--strict"], cwd=checkout, capture_output=True, text=True, timeout=120)


@pytest.mark.programs
def test_the_site_builds(checkout: Path) -> None:
    built = build(checkout)
    assert built.returncode == 0, built.stderr
    site = checkout / "dist" / "site"
    pages = {page.stem for page in (checkout / "docs").glob("*.md")}
    assert {page.parent.name for page in site.glob("*/index.html")} >= pages - {"index"}
    assert 'class="mermaid"' in (site / "index.html").read_text()
    assert (site / "examples" / "ray_serve_app.py").exists()
    assert not list(site.glob("*.py"))
    profiles = (site / "profiles" / "index.html").read_text()
    assert "benchmarks/results/profiles-cpu.json" in profiles
    assert 'href="../benchmarks/results' not in profiles, "the site has no such file"


@pytest.mark.programs
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[a part](serving.md#nowhere)", "#nowhere"),
        ("![a picture](nowhere.png)", "nowhere.png"),
    ],
)
def test_a_broken_link_is_an_error(text: str, message: str, checkout: Path) -> None:
    with (checkout / "docs" / "faq.md").open("a") as page:
        page.write(f"\n{text}\n")
    refused = build(checkout)
    assert refused.returncode != 0
    assert message in refused.stderr


@pytest.mark.programs
def test_a_page_outside_the_navigation_is_an_error(checkout: Path) -> None:
    (checkout / "docs" / "forgotten.md").write_text("# Forgotten\n")
    refused = build(checkout)
    assert refused.returncode != 0
    assert "forgotten.md" in refused.stderr


def test_every_page_is_in_the_navigation_once() -> None:
    text = re.sub(r"!!python/name:\S+", "x", (ROOT / "mkdocs.yml").read_text())
    sections = yaml.safe_load(text)["nav"]
    listed = [
        page if isinstance(page, str) else next(iter(page.values()))
        for one in sections
        for page in next(iter(one.values()))
    ]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_readme_and_the_site_begin_with_the_same_picture() -> None:
    pictures = [diagrams(path) for path in (ROOT / "README.md", ROOT / "docs" / "index.md")]
    assert len(pictures[0]) == 1
    assert pictures[0] == pictures[1]


def test_the_waterfall_shows_the_recorded_run() -> None:
    """Each phase has the milliseconds of the run that the README's table shows."""
    runs = json.loads((ROOT / "benchmarks" / "results" / "startup-cpu-demo.json").read_text())["runs"]
    (waterfall,) = [one for one in diagrams(ROOT / "docs" / "how-it-works.md") if one.startswith("gantt")]
    _, warm, cold = re.split(r"(?m)^  section ", waterfall)
    for section, system in ((warm, "warm"), (cold, "cold")):
        (run,) = [one for one in runs if one["system"] == system]
        expected = {
            phase["name"]: [round(1000 * moment) for moment in (phase["start"], phase["start"] + phase["seconds"])]
            for phase in run["phases"]
        }
        shown = {name: [int(start), int(end)] for name, start, end in re.findall(r"  (.+) :(\d+), (\d+)\n?", section)}
        assert shown == expected
        marks = dict(re.findall(r"  (\w+) :milestone, (\d+), 0ms", section))
        assert marks == {mark: str(round(1000 * run[mark])) for mark in ("attached", "ready")}


def diagrams(page: Path) -> list[str]:
    return re.findall(r"```mermaid\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
