"""Every route that needs no GPU, for real: one state, one layer, and a proof of each image."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT, run_cli

if TYPE_CHECKING:
    from pathlib import Path

    from tests.image.conftest import Storage


@pytest.mark.usefixtures("docker")
def test_one_state_is_the_same_layer_by_every_route_and_each_image_is_proven(storage: Storage, tmp_path: Path) -> None:
    assert storage.root.is_dir(), "podman's, for the image with the packages"
    if shutil.which("docker-registry") is None:
        pytest.skip("there is no docker-registry (Debian: apt-get install docker-registry)")
    output = tmp_path / "routes.json"
    made = run_cli("bench", "routes", "--checkout", ROOT, "--output", output, timeout=1800)
    assert made.returncode == 0, made.stderr[-5000:]
    found = json.loads(output.read_text())["routes"]
    assert set(found) == {"classic builder", "BuildKit", "podman", "OCI layout", "registry"}
    assert all(route["passed"] for route in found.values())
    assert len({route["warm_layer"] for route in found.values()}) == 1, made.stdout
    assert len({route["set_digest"] for route in found.values()}) == 1
