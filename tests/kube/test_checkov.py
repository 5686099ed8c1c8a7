"""checkov reports no finding in overlays, renderings, bakes and the chart, with the exceptions in k8s/.checkov.yaml."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from chatterbox_prewarm.kube.proof import Request, render_proofs
from tests.helpers.helm import helm
from tests.helpers.manifests import K8S, kustomize
from tests.helpers.renderings import H100, IMAGE, L4, render_for
from tests.kube.test_chart import EVERYTHING

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = K8S / ".checkov.yaml"


def scan(folder: Path) -> dict[str, Any]:
    checkov = shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not installed; run `make checks`")
    finished = subprocess.run(
        [checkov, "--config-file", str(CONFIG), "--directory", str(folder), "--output", "json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


@pytest.mark.programs
def test_checkov_reports_no_finding(tmp_path: Path) -> None:
    for path in [*(K8S / "overlays").iterdir(), K8S / "bake"]:
        (tmp_path / f"{path.name}.yaml").write_text(yaml.safe_dump_all(kustomize(path)))
    for path in (K8S / "components").rglob("autoscaler.yaml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "rendered.yaml").write_text(render_for([H100, L4], pre_pull=True).to_yaml())
    (tmp_path / "chart.yaml").write_text(yaml.safe_dump_all(helm(EVERYTHING)))
    crossed = replace(L4, cross_compiled=True)
    proofs = render_proofs(Request(image=IMAGE, states=(crossed,), registry_secret="login"))
    (tmp_path / "proofs.yaml").write_text(proofs.to_yaml())
    report = scan(tmp_path)
    assert report["summary"]["passed"] > 500
    assert report["summary"]["parsing_errors"] == 0
    findings = {(one["check_id"], one["check_name"], one["resource"]) for one in report["results"]["failed_checks"]}
    assert findings == set()


@pytest.mark.programs
def test_checkov_reports_a_writable_root(tmp_path: Path) -> None:
    (deployment,) = [document for document in kustomize(K8S / "base") if document["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(deployment))
    assert "CKV_K8S_22" in {one["check_id"] for one in scan(tmp_path)["results"]["failed_checks"]}


def test_every_skipped_check_has_a_reason() -> None:
    lines = CONFIG.read_text().splitlines()
    skipped = [number for number, line in enumerate(lines) if line.strip().startswith("- CKV")]
    assert skipped
    assert all(lines[number - 1].strip().startswith("# ") for number in skipped)
