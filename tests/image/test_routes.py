"""Real builds on the routes that other tests do not run: one state, the same layer, and a proof of each image.

test_image.py and test_build.py build with BuildKit, and test_publish.py adds a state to an image in an OCI layout.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT, run_benchmark

if TYPE_CHECKING:
    from pathlib import Path

    from tests.image.conftest import Storage


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("docker")
def test_routes_make_the_same_layer_of_a_state_and_prove_their_images(storage: Storage, tmp_path: Path) -> None:
    assert storage.root.is_dir(), "podman stores the image with the packages there"
    if shutil.which("docker-registry") is None:
        pytest.skip("there is no docker-registry (Debian: apt-get install docker-registry)")
    output = tmp_path / "routes.json"
    finished = run_benchmark(
        *("routes", "--checkout", ROOT, "--output", output, "--route", "podman", "--route", "registry"), timeout=1800
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    routes = json.loads(output.read_text())["routes"]
    assert set(routes) == {"classic builder", "podman", "registry"}
    assert all(route["passed"] for route in routes.values())
    assert len({route["warm_layer"] for route in routes.values()}) == 1, finished.stdout
    assert len({route["set_digest"] for route in routes.values()}) == 1
