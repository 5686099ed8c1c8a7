"""checkov finds nothing in any overlay, rendering or bake that k8s/.checkov.yaml gives no reason for."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.helpers.manifests import K8S, kustomize
from tests.kube.test_render import H100, L4, render_for

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = K8S / ".checkov.yaml"


def scan(folder: Path) -> dict[str, Any]:
    checkov = shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is missing: make checks")
    done = subprocess.run(
        [checkov, "--config-file", str(CONFIG), "--directory", str(folder), "--output", "json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_is_found_without_a_reason(tmp_path: Path) -> None:
    for path in [*(K8S / "overlays").iterdir(), K8S / "bake"]:
        (tmp_path / f"{path.name}.yaml").write_text(yaml.safe_dump_all(kustomize(path)))
    for path in (K8S / "components").rglob("autoscaler.yaml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "rendered.yaml").write_text(render_for([H100, L4], pre_pull=True).to_yaml())
    found = scan(tmp_path)
    assert found["summary"]["passed"] > 500
    assert found["summary"]["parsing_errors"] == 0
    findings = {(one["check_id"], one["check_name"], one["resource"]) for one in found["results"]["failed_checks"]}
    assert findings == set()


def test_a_finding_is_seen(tmp_path: Path) -> None:
    (deployment,) = [document for document in kustomize(K8S / "base") if document["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(deployment))
    assert "CKV_K8S_22" in {one["check_id"] for one in scan(tmp_path)["results"]["failed_checks"]}


def test_every_check_that_is_left_out_has_a_reason() -> None:
    lines = CONFIG.read_text().splitlines()
    left_out = [number for number, line in enumerate(lines) if line.strip().startswith("- CKV")]
    assert left_out
    assert all(lines[number - 1].strip().startswith("# ") for number in left_out)
