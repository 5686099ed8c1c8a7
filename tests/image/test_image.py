"""The Dockerfile builds without a GPU, and the image passes its proof and speaks under the documented flags.

The weights are a small random checkpoint instead of the published one. Everything else is as for a user.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save

from benchmarks.image import build, ran_steps
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION
from chatterbox_prewarm.weights.record import RECORD_NAME
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.conftest import run_cli
from tests.helpers.hub_server import Hub, serve
from tests.image.conftest import SYNTHETIC, TAG

if TYPE_CHECKING:
    from pathlib import Path

# The first test waits for the installation of the packages and a bake.
pytestmark = pytest.mark.timeout(900)

CACHE = "/var/cache/chatterbox-prewarm"
FLAGS = [
    *("--read-only", "--network", "none", "--user", "12345:12345", "--cap-drop", "ALL"),
    *("--tmpfs", "/tmp", "--tmpfs", f"{CACHE}:exec,mode=1777"),
]


def run(docker: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([docker, *arguments], capture_output=True, text=True, check=False, timeout=300)


def test_the_image_passes_its_proof_under_the_documented_flags(docker: str, image: str) -> None:
    proven = run(docker, "run", "--rm", *FLAGS, image, "prove", "--here", "--evidence", "-")
    assert proven.returncode == 0, proven.stderr
    evidence = json.loads(proven.stdout)
    assert evidence["passed"]
    assert evidence["observed"]["isolation"]["uid"] == 12345
    assert evidence["observed"]["network"] == []
    assert evidence["observed"]["state_writes"] == evidence["observed"]["cache_writes"] == []
    assert evidence["observed"]["metrics"]["misses"] == {}
    assert set(evidence["observed"]["metrics"]["hits"]) == {"bytecode", "conditionals", "aot"}


def test_the_conversion_of_speech_passes_its_proof_without_upstreams_packages(image: str) -> None:
    proven = run_cli("prove", "--image", image, "--convert", "--json")
    assert proven.returncode == 0, proven.stderr
    evidence = json.loads(proven.stdout)
    assert evidence["observed"]["metrics"]["misses"] == {}
    assert 40 <= evidence["observed"]["audio"]["decibels"] < 300, "packages round otherwise than eager mode"


def test_the_proof_of_a_missing_image_is_refused(docker: str) -> None:
    assert docker
    refused = run_cli("prove", "--image", "chatterbox-prewarm-test:nowhere")
    assert refused.returncode == 14
    assert "has no image" in refused.stderr


def ask(docker: str, container: str, method: str, path: str, body: str = "") -> tuple[int, bytes]:
    """Send a request from inside the container, because it has no network; its body is printed in hexadecimal."""
    program = (
        "import http.client,sys;c=http.client.HTTPConnection('127.0.0.1',8000,timeout=60);"
        f"c.request({method!r},{path!r},{body!r} or None);r=c.getresponse();print(r.status,r.read().hex())"
    )
    finished = run(docker, "exec", container, "python", "-c", program)
    if finished.returncode != 0:
        return 0, b""
    status, _, content = finished.stdout.strip().partition(" ")
    return int(status), bytes.fromhex(content)


def test_the_container_speaks_without_network_and_drains(docker: str, image: str) -> None:
    started = run(docker, "run", "--detach", *FLAGS, "--hostname", "elsewhere", image)
    assert started.returncode == 0, started.stderr
    container = started.stdout.strip()
    try:
        deadline = time.monotonic() + 180
        status, body = 0, b""
        while status != 200 and time.monotonic() < deadline:
            status, body = ask(docker, container, "GET", "/readyz")
        assert status == 200, run(docker, "logs", container).stderr
        state: dict[str, Any] = json.loads(body)
        assert state["misses"] == {}
        assert set(state["hits"]) == {"bytecode", "conditionals", "aot"}
        assert state["profile"] == "aot"
        sentence = json.dumps({"input": "Hello.", "seed": 1, "max_new_tokens": 12, "response_format": "wav"})
        status, sound = ask(docker, container, "POST", "/v1/audio/speech", sentence)
        assert status == 200
        assert sound.startswith(b"RIFF")
        status, refused = ask(docker, container, "POST", "/v1/audio/voices")
        assert (status, json.loads(refused)["error"]["code"]) == (501, "uploads_unsupported")
        assert run(docker, "stop", "--time", "60", container).returncode == 0
        exited = run(docker, "inspect", "--format", "{{.State.ExitCode}}", container)
        assert exited.stdout.strip() == "0"
    finally:
        run(docker, "rm", "--force", container)


def test_the_image_has_only_the_packages_of_the_lean_runtime(docker: str, image: str) -> None:
    left_out = ["chatterbox", "diffusers", "librosa", "numba", "scipy", "torchaudio", "transformers", "triton"]
    program = f"from importlib.util import find_spec; print([name for name in {left_out} if find_spec(name)])"
    found = run(docker, "run", "--rm", "--entrypoint", "python", image, "-c", program)
    assert found.stdout.strip() == "[]", found.stderr


def test_a_voice_cannot_be_made_in_the_lean_image(docker: str, image: str) -> None:
    for command in (["bake", "--warm", "/tmp/warm"], ["weights", "synthesize", "/tmp/weights", "--size", "mini"]):
        refused = run(docker, "run", "--rm", *FLAGS, image, *command)
        assert refused.returncode == 15, refused.stderr
        assert "PACKAGES=full" in refused.stderr


def test_a_read_only_cache_folder_is_reported(docker: str, image: str) -> None:
    flags = [flag for flag in FLAGS if not flag.startswith(CACHE)]
    del flags[-1]  # the --tmpfs before it
    refused = run(docker, "run", "--rm", *flags, image)
    assert refused.returncode == 16
    assert "mount a tmpfs or an emptyDir there" in refused.stderr


def test_the_state_is_read_only_and_the_image_contains_no_secret(docker: str, image: str) -> None:
    script = (
        "! touch /opt/chatterbox-prewarm/warm/x 2>/dev/null && ! touch /opt/chatterbox-prewarm/weights/x 2>/dev/null "
        '&& test -z "$(find /opt/chatterbox-prewarm/warm /opt/chatterbox-prewarm/weights -type f ! -perm 0444)" '
        '&& test -z "$(find /opt/chatterbox-prewarm/warm ! -user root)" '
        '&& test -z "$(ls -A /run/secrets 2>/dev/null)"'
    )
    checked = run(docker, "run", "--rm", "--entrypoint", "sh", image, "-c", script)
    assert checked.returncode == 0, checked.stderr
    script = "grep -rl 'timeout = 47' /etc /root /run /tmp /build /opt/venv/pyvenv.cfg 2>/dev/null"
    leaked = run(docker, "run", "--rm", "--user", "0", "--entrypoint", "sh", image, "-c", script)
    assert leaked.stdout == ""
    history = run(docker, "history", "--no-trunc", image).stdout
    assert "timeout = 47" not in history


def test_the_image_has_the_documented_labels_and_no_gpu_setting(docker: str, image: str) -> None:
    config = json.loads(run(docker, "inspect", "--format", "{{json .Config}}", image).stdout)
    prefix = "io.chatterbox-prewarm."
    labels = {name.removeprefix(prefix): value for name, value in config["Labels"].items() if name.startswith(prefix)}
    assert labels == {
        "schema": str(SCHEMA_VERSION),
        "variant": "english",
        "profile": "aot",
        "gpu": "none",
        "torch": "torch-2.6",
        "packages": "lean",
    }
    assert config["User"] == "12345:12345"
    assert not any(entry.startswith("NVIDIA_VISIBLE_DEVICES") for entry in config["Env"])
    assert "HF_HUB_OFFLINE=1" in config["Env"]


def test_an_image_that_is_only_in_the_engine_is_rendered_and_judged(image: str) -> None:
    rendered = run_cli("k8s", "render", "--image", image)
    assert rendered.returncode == 0, rendered.stderr
    assert f"image: {image}" in rendered.stdout
    judged = run_cli("verify", "--image", image)
    assert judged.returncode == 0, judged.stderr
    assert "using the image of the local engine" in judged.stderr


def test_file_times_survive_a_registry(docker: str, image: str) -> None:
    """A registry drops fractions of a second from modification times, but Numba compares exact times."""
    script = "find /opt/venv /opt/chatterbox-prewarm/weights -type f -printf '%T@\\n' | sort -u"
    times = run(docker, "run", "--rm", "--entrypoint", "sh", image, "-c", script)
    assert times.stdout.split() == ["1735689600.0000000000"], "all files have one whole-second time"


def test_the_build_fetches_weights_from_a_hub_with_a_token_that_stays_out_of_the_image(
    docker: str, context: Path, tmp_path: Path
) -> None:
    """Builds the default source of the weights, with a hub on the loopback interface."""
    # Each run needs new content and a new commit, because the builder caches the files of earlier runs.
    revision = os.urandom(20).hex()
    tensors = save({"a": np.frombuffer(os.urandom(20_000_000), dtype=np.uint8)})
    document = json.dumps({"version": revision}).encode()
    files = {name: tensors if name in ENGLISH.safetensors else document for name in ENGLISH.files}
    token = tmp_path / "token"
    token.write_text("hf_sesame\n")
    tag = f"{TAG}-weights"
    with serve(Hub(repository=ENGLISH.repository, revision=revision, files=files)) as hub:
        hub.cut["t3_cfg.safetensors"] = 11_000_000
        arguments = ("--build-arg", f"HF_ENDPOINT={hub.endpoint}", "--build-arg", f"REVISION={revision}")
        build(context, tag, ["--target", "weights-hub", *arguments, "--secret", f"id=hf_token,src={token}"])
        assert len(hub.ranges("GET", "t3_cfg.safetensors")) == 2, "the interrupted download was resumed"
        assert {sent for name, sent in hub.authorizations if name in files} == {"Bearer hf_sesame"}
    try:
        script = "cd /opt/chatterbox-prewarm/weights && sha256sum *.* && stat -c '%a %Y %n' * && env"
        listed = run(docker, "run", "--rm", "--entrypoint", "sh", tag, "-c", script).stdout
        for name, content in files.items():
            assert f"{hashlib.sha256(content).hexdigest()}  {name}" in listed
            assert f"444 1735689600 {name}" in listed
        assert f"444 1735689600 {RECORD_NAME}" in listed
        assert "sesame" not in listed + run(docker, "history", "--no-trunc", tag).stdout
    finally:
        subprocess.run([docker, "rmi", "--force", tag], capture_output=True, check=False)


def test_a_change_of_the_server_downloads_installs_and_bakes_nothing(docker: str, context: Path, image: str) -> None:
    """Only the last two layers are built again."""
    assert image
    changed = context / "chatterbox_prewarm" / "serve" / "http" / "server.py"
    # Each run needs new content, because the builder caches the files of earlier runs.
    changed.write_text(changed.read_text() + f"\n# {os.urandom(20).hex()}\n")
    ran = ran_steps(build(context, f"{TAG}-changed", SYNTHETIC))
    try:
        kept = {"[base", "[installed", "[packages", "[weights-synthetic", "[bake"}
        assert [step for step in ran if step.split()[0] in kept] == []
        assert any("COPY chatterbox_prewarm /opt" in step for step in ran)
    finally:
        subprocess.run([docker, "rmi", "--force", f"{TAG}-changed"], capture_output=True, check=False)
