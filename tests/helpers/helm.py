"""Render the Helm chart in a test, with the Helm of `make checks`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.manifests import ROOT, Document

CHART = ROOT / "charts" / "chatterbox"
PROGRAM = Path(__file__).with_name("helm_program.py")
#: Labels and annotations that only the chart adds.
_HELM = ("app.kubernetes.io/managed-by", "helm.sh/chart")


def run_helm(values: Document | None = None, *, name: str = "chatterbox", chart: Path = CHART) -> dict[str, Any]:
    """Lint and render a chart; return the findings, and the text of each template or an error."""
    checkov = shutil.which("checkov")  # a program of the same environment
    if checkov is None:
        pytest.skip("Helm is not installed; run `make checks`")
    finished = subprocess.run(
        [Path(checkov).with_name("python"), PROGRAM, chart],
        input=json.dumps({"values": values or {}, "name": name}),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def helm(values: Document | None = None, *, name: str = "chatterbox") -> list[Document]:
    """Render the chart; return its documents without Helm's labels. The linter must have no finding."""
    result = run_helm(values, name=name)
    assert "error" not in result, result["error"]
    assert result["lint"]["errors"] == [], result["lint"]
    documents = []
    for template, text in result["rendered"].items():
        if template.endswith(".yaml"):
            documents += [document for document in yaml.safe_load_all(text) if document]
    for document in documents:
        for label in _HELM:
            del document["metadata"]["labels"][label]
    return documents


def refusal(values: Document) -> str:
    """Return the message with which Helm refuses values."""
    result = run_helm(values)
    assert "rendered" not in result, "Helm accepts the values"
    message: str = result["error"]
    return message
