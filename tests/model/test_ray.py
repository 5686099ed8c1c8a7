"""Ray runs the Ray Serve example as its readers do, with the paths of this test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from chatterbox_prewarm.bench.server import free_port
from tests.conftest import ROOT

pytestmark = pytest.mark.programs

RAY = ROOT / ".venv-ray" / "bin"


@pytest.mark.timeout(660)
def test_the_ray_serve_example_serves(baked: Path, mini: Path, tmp_path: Path, socket_dir: Path) -> None:
    if not (RAY / "serve").exists():
        pytest.skip("Ray is missing: make ray")
    text = (ROOT / "docs" / "examples" / "ray_serve_app.py").read_text()
    for documented, path in {
        "/opt/chatterbox-prewarm/warm": baked,
        "/opt/chatterbox-prewarm/weights": mini,
        "/var/cache/chatterbox-prewarm": tmp_path / "cache",
    }.items():
        assert text.count(f'"{documented}"') == 1
        text = text.replace(documented, str(path))
    (tmp_path / "ray_serve_app.py").write_text(text)
    port = free_port()
    # The configuration of the RayService example, for the CPU of this machine.
    service = yaml.safe_load((ROOT / "docs" / "examples" / "rayservice.yaml").read_text())
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"]["device"] = "cpu"
    (deployment,) = application["deployments"]
    deployment["ray_actor_options"] = {"num_cpus": 1, "num_gpus": 0}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [str(RAY / "serve"), "run", str(tmp_path / "config.yaml")]
    environment = {
        **os.environ,
        "PATH": f"{RAY}:{os.environ['PATH']}",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(socket_dir),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=400) as client:
            deadline = time.monotonic() + 480
            while not ready(client):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            response = client.get("/", params={"text": "Hello.", "max_new_tokens": 12})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "audio/wav"
        assert response.content.startswith(b"RIFF")
        assert len(workers_of(tmp_path)) == 1
        assert len(response.content) > 5000
        process.send_signal(signal.SIGINT)
        process.wait(60)
        assert workers_of(tmp_path) == [], "the worker ends with its replica"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ready(client: httpx.Client) -> bool:
    """Return whether Ray has a replica. It has one after the model has spoken."""
    try:
        return client.get("/-/healthz").status_code == 200 and b"/" in client.get("/-/routes").content
    except httpx.TransportError:
        return False


def workers_of(folder: Path) -> list[int]:
    """Return the process IDs of the workers whose environment names this folder."""
    command = ["pgrep", "-f", r"chatterbox_prewarm\.serve\.workers [0-9]+$"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    workers = []
    for pid in map(int, result.stdout.split()):
        with contextlib.suppress(FileNotFoundError):  # it has ended
            if str(folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                workers.append(pid)
    return workers
