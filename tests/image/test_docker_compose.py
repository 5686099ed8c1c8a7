"""The files in compose/ are valid for Docker Compose, and the server starts with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.commands.serving import serve
from tests.conftest import ROOT
from tests.image.test_image import FLAGS

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = ROOT / "compose"
#: Each way to combine the files, as COMPOSE_FILE lists them.
COMBINATIONS = [
    ":".join(["compose.yaml", *filter(None, files)])
    for files in product(("", "gpu.yaml", "gpus.yaml"), ("", "open-webui.yaml"), ("", "sillytavern.yaml"))
]


def compose(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Docker Compose in a folder, without the settings of this machine."""
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("Docker Compose is not installed; run `make checks`")
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "DOCKER_HOST"}}
    return subprocess.run(
        [program, *arguments],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def configuration(files: str, **environment: str) -> dict[str, Any]:
    """Return the files as Compose combines and validates them."""
    finished = compose(FOLDER, "config", "--format", "json", COMPOSE_FILE=files, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "", "Compose warns of a variable without a value"
    combined: dict[str, Any] = json.loads(finished.stdout)
    return combined


@pytest.mark.programs
@pytest.mark.parametrize("files", COMBINATIONS)
def test_every_combination_of_files_is_valid(files: str) -> None:
    services = configuration(files)["services"]
    clients = {name.removesuffix(".yaml") for name in files.split(":")} & {"open-webui", "sillytavern"}
    assert services.keys() == {"chatterbox", *clients}
    for name, service in services.items():
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}, "only this machine can connect"
        assert name == "chatterbox" or service["depends_on"]["chatterbox"]["condition"] == "service_healthy"
    reservations = services["chatterbox"].get("deploy", {}).get("resources", {}).get("reservations", {})
    count = {"gpu.yaml": 1, "gpus.yaml": -1}  # -1 is `all`
    devices = [{"driver": "nvidia", "count": count[one], "capabilities": ["gpu"]} for one in count if one in files]
    assert reservations.get("devices", []) == devices


@pytest.mark.programs
def test_an_invalid_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("services: {chatterbox: {image: x, read_olny: true}}")
    refused = compose(tmp_path, "config")
    assert refused.returncode != 0
    assert "read_olny" in refused.stderr


@pytest.mark.programs
def test_the_server_has_the_restrictions_of_the_proof() -> None:
    server = configuration("compose.yaml")["services"]["chatterbox"]
    assert server["read_only"] is True
    assert server["user"] == FLAGS[FLAGS.index("--user") + 1]
    assert server["cap_drop"] == [FLAGS[FLAGS.index("--cap-drop") + 1]]
    documented = {FLAGS[place + 1].partition(":")[0] for place, flag in enumerate(FLAGS) if flag == "--tmpfs"}
    mounted = {one.partition(":")[0]: set(one.partition(":")[2].split(",")) for one in server["tmpfs"]}
    assert mounted.keys() == documented
    assert {"exec", "mode=1777"} <= mounted["/var/cache/chatterbox-prewarm"]


@pytest.mark.programs
def test_the_clients_use_the_routes_of_the_server() -> None:
    services = configuration("compose.yaml:open-webui.yaml:sillytavern.yaml", CHATTERBOX_VOICE="ann")["services"]
    port = services["chatterbox"]["ports"][0]["target"]
    webui = services["open-webui"]["environment"]
    assert webui["AUDIO_TTS_OPENAI_API_BASE_URL"] == f"http://chatterbox:{port}/v1"
    assert webui["AUDIO_TTS_VOICE"] == "ann"
    assert services["chatterbox"]["environment"]["CHATTERBOX_PREWARM_VOICE_ALIAS"] == "*=ann"
    assert f"http://chatterbox:{port}/v1/audio/speech" in (FOLDER / "sillytavern.yaml").read_text()


def test_the_examples_list_every_variable() -> None:
    files = "".join(path.read_text() for path in FOLDER.glob("*.yaml"))
    used = set(re.findall(r"\$\{(\w+)", files)) - {"OPEN_WEBUI_IMAGE", "SILLYTAVERN_IMAGE"}
    assert set(re.findall(r"^(?:# )?([A-Z_]+)=", (FOLDER / ".env.example").read_text(), re.MULTILINE)) == {
        *used,
        "COMPOSE_FILE",
    }
    options = {parameter.envvar for parameter in serve.params} | {"CHATTERBOX_PREWARM_TOKEN"}
    listed = set(re.findall(r"^# (CHATTERBOX_PREWARM_\w+)=", (FOLDER / "serve.env.example").read_text(), re.MULTILINE))
    assert listed
    assert listed <= options
    set_in_files = {
        name
        for path in FOLDER.glob("*.yaml")
        for name in yaml.safe_load(path.read_text())["services"].get("chatterbox", {}).get("environment", {})
    }
    assert set_in_files <= options


@pytest.mark.containers
@pytest.mark.programs
@pytest.mark.timeout(900)
def test_the_server_starts_speaks_and_stops(docker: str, image: str, tmp_path: Path) -> None:
    assert docker
    shutil.copytree(FOLDER, tmp_path / "compose")
    port = free_port()
    (tmp_path / "compose" / ".env").write_text(f"CHATTERBOX_IMAGE={image}\nCHATTERBOX_PORT={port}\n")
    (tmp_path / "compose" / "serve.env").write_text("CHATTERBOX_PREWARM_VOICE_ALIAS=alloy=default onyx=default\n")
    name = f"chatterbox-test-{port}"
    try:
        started = compose(tmp_path / "compose", "--project-name", name, "up", "--detach", "--wait", "--no-build")
        assert started.returncode == 0, started.stderr
        body = {"input": "Hello.", "voice": "onyx", "max_new_tokens": 12, "response_format": "wav"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/audio/speech", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            assert response.status == 200
            assert response.read(4) == b"RIFF"
        running = compose(tmp_path / "compose", "--project-name", name, "ps", "--format", "json")
        assert json.loads(running.stdout)["Health"] == "healthy"
        stopped = compose(tmp_path / "compose", "--project-name", name, "stop")
        assert stopped.returncode == 0, stopped.stderr
        ended = compose(tmp_path / "compose", "--project-name", name, "ps", "--all", "--format", "json")
        assert json.loads(ended.stdout)["ExitCode"] == 0, "the server drained and was not killed"
    finally:
        compose(tmp_path / "compose", "--project-name", name, "down", "--volumes", "--timeout", "10")
