"""The reference pages that `docs/reference.py` writes are up to date and complete."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.image.labels import EVIDENCE, PACKAGES, image_labels
from tests.conftest import ROOT
from tests.helpers.states import make_state_for

if TYPE_CHECKING:
    from pathlib import Path

#: Variables that only this package's own processes set.
INTERNAL = {
    "CHATTERBOX_PREWARM_NAME",  # a placeholder in a text
    "CHATTERBOX_PREWARM_PARENT",
    "CHATTERBOX_PREWARM_STAND_IN",
    "CHATTERBOX_PREWARM_STAND_IN_LOG",
    "CHATTERBOX_PREWARM_STAND_IN_READS",
}


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["metrics", "configuration", "labels", "claims"])
def test_the_page_is_up_to_date(name: str) -> None:
    command = [sys.executable, "docs/reference.py", name]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert page(name) == printed, f"run: python docs/reference.py {name} > docs/{name}.md"


def test_every_label_of_a_metric_is_described() -> None:
    metrics, _, labels = page("metrics").partition("| label | values |")
    used = {label for row in metrics.splitlines() if row.startswith("| `") for label in row.split("|")[3].split(", ")}
    assert {label.strip("` ") for label in used} - {""} == {*first_column(labels)} - {"le"}


def test_every_environment_variable_is_listed() -> None:
    package = ROOT / "chatterbox_prewarm"
    sources = "".join(path.read_text() for path in [*package.rglob("*.py"), *package.rglob("*.cpp")])
    used = set(re.findall(r"CHATTERBOX_PREWARM_[A-Z_]*[A-Z]", sources))
    listed = set(re.findall(r"`(CHATTERBOX_PREWARM_[A-Z_]+)`", page("configuration")))
    assert used - INTERNAL <= listed
    assert not listed & INTERNAL


def test_no_variable_means_two_things() -> None:
    """A variable that is no option must not set one, such as the revision of a checkpoint."""
    variables, _, options = page("configuration").partition("\n## weights fetch\n")
    assert options
    others = set(re.findall(r"^\| `(CHATTERBOX_PREWARM_[A-Z_]+)` \|", variables, re.MULTILINE))
    of_options = set(re.findall(r"^\| `--[^|]+\| `(CHATTERBOX_PREWARM_[A-Z_]+)` \|", options, re.MULTILINE))
    assert "CHATTERBOX_PREWARM_REVISION" in of_options
    assert "CHATTERBOX_PREWARM_SOURCE_REVISION" in others
    assert not others & of_options


def test_every_label_of_an_image_is_listed(tmp_path: Path) -> None:
    facts = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}
    manifest = make_state_for(tmp_path / "warm", facts)
    labels = image_labels([manifest], base_name="registry.example.com/speech:cold", base_digest="sha256:" + "a" * 64)
    assert set(first_column(page("labels"))) == {*labels, PACKAGES, EVIDENCE}
    dockerfile = (ROOT / "Dockerfile").read_text()
    set_there = re.findall(r"((?:org\.opencontainers\.image|io\.chatterbox-prewarm)[a-z.-]*)=", dockerfile)
    assert len(set_there) > 5
    assert set(set_there) <= set(first_column(page("labels")))
