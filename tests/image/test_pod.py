"""Podman runs the overlay cpu-demo with the built image, and the kubelet's rules are applied to its probes.

The tests check which failures restart a container and which do not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from benchmarks.pod import Pod
from benchmarks.pods import wait_ready
from benchmarks.routes import give_to_podman
from chatterbox_prewarm.bench.clients import make_requests, request_speech
from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.system.paths import WARM
from tests.conftest import run_benchmark
from tests.helpers.manifests import K8S, document_of, kustomize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.manifests import Document
    from tests.image.conftest import Storage

# The first test waits for the image and for its copy to podman.
pytestmark = pytest.mark.timeout(900)

#: Limits for a short, a medium and a long text, because random weights never stop.
TOKENS = (6, 12, 25)
BODIES = make_requests(TOKENS, 2, voice=DEFAULT_VOICE)
#: Treat a worker as hung after 5 s instead of two minutes.
HANG = {"CHATTERBOX_PREWARM_HANG_SECONDS": "5"}
TIMEOUT = 120.0


@pytest.fixture(scope="module")
def image_in_podman(storage: Storage, image: str) -> str:
    """Copy the image to podman."""
    helpers = f"{os.environ['PATH']}:/usr/lib/podman:/usr/libexec/podman"
    if not all(shutil.which(name, path=helpers) for name in ("netavark", "catatonit")):
        pytest.skip("for pods, podman needs netavark and catatonit (Debian: apt-get install netavark catatonit)")
    assert storage.root.is_dir()
    give_to_podman(image)
    return image


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Render the overlay. Threads must not spin while they wait, because other tests need the processors."""
    rendered = kustomize(K8S / "overlays" / "cpu-demo")
    document_of(rendered, "ConfigMap")["data"]["OMP_WAIT_POLICY"] = "passive"
    return rendered


@pytest.fixture(scope="module")
def running(documents: list[Document], image_in_podman: str) -> Iterator[Pod]:
    """A warm and ready pod. After each test it is ready again, also if its processes were killed."""
    with Pod(documents, name="running", port=free_port(), image=image_in_podman, settings=HANG) as pod:
        with pod.watch() as watched:
            wait_ready(pod, watched)
        yield pod


@pytest.fixture
def state(docker: str, image: str, tmp_path: Path) -> Path:
    """Copy the warm state of the image."""
    container = subprocess.run([docker, "create", image], capture_output=True, text=True, check=True).stdout.strip()
    try:
        subprocess.run([docker, "cp", f"{container}:{WARM}", tmp_path / "warm"], check=True, capture_output=True)
    finally:
        subprocess.run([docker, "rm", container], capture_output=True, check=True)
    tmp_path.chmod(0o755)
    return tmp_path / "warm"


def wait_until(condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_warm_and_cold_starts_are_measured_and_an_update_loses_no_request(
    documents: list[Document], image_in_podman: str, tmp_path: Path
) -> None:
    manifests, output = tmp_path / "demo.yaml", tmp_path / "pods.json"
    manifests.write_text(yaml.safe_dump_all(documents))
    # Two pods on two cores can finish these requests within the drain time of 100 s.
    arguments = ("--rounds", "1", "--tokens", "6,6,6", "--clients", "2", "--output", output)
    finished = run_benchmark("pods", "--manifests", manifests, "--image", image_in_podman, *arguments, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-5000:]
    report = json.loads(output.read_text())
    (warm,), (cold,) = report["starts"]["warm"], report["starts"]["cold"]
    assert warm["misses"] == {}
    assert warm["hits"]["bytecode"] > 0
    assert cold["hits"] == {}
    assert cold["profile"] == "eager"
    assert warm["restarts"] == cold["restarts"] == 0
    assert 0 < warm["since_exec"]["ready"] <= warm["ready"] + 1, "the kubelet cannot see it earlier"
    assert {"warm", "cold"} == report["ready"].keys()
    update = report["update"]
    assert update["sound"] == update["answers"] > 2 * update["clients"]
    assert (update["old_exit_code"], update["killed"], update["misses"]) == (0, False, {})


def test_the_container_has_the_permissions_of_the_manifest(running: Pod) -> None:
    status = _kernel_status(running)
    assert (status["Uid"].split(), status["Gid"].split()) == (["12345"] * 4, ["12345"] * 4)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    cache = "/var/cache/chatterbox-prewarm"
    script = f"touch /opt/x /tmp/x {cache}/x; cp /bin/true {cache}/run && {cache}/run && echo executed; rm {cache}/run"
    # A build with secrets leaves this folder, empty.
    secrets = "ls -A /var/run/secrets 2>/dev/null | grep . || echo no secret"
    output = _in(running, "sh", "-c", f"{script}; {secrets}; env")
    assert "touch: cannot touch '/opt/x': Read-only file system" in output
    assert output.count("cannot touch") == 1
    assert "executed" in output, "libraries are loaded from the cache"
    assert "no secret" in output
    assert "NVIDIA_VISIBLE_DEVICES" not in output
    assert "CHATTERBOX_PREWARM_CPU_REQUEST=2\n" in output


def test_a_corrupted_state_causes_a_slow_start_but_no_crash_loop(
    documents: list[Document], image_in_podman: str, state: Path
) -> None:
    damaged = max(state.rglob("aot/*/region.so"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(content)
    with (
        Pod(documents, name="corrupted", port=free_port(), image=image_in_podman, folders={str(WARM): state}) as pod,
        pod.watch() as watched,
    ):
        wait_ready(pod, watched)
        status = pod.target.status()
        assert status["misses"].keys() == {"aot"}
        assert status["hits"].keys() >= {"bytecode", "conditionals"}, "intact families are used"
        assert "miss in aot" in pod.log()
        assert request_speech(pod.target, BODIES[0], streamed=False).outcome == "sound"
        assert [event.kind for event in watched.events] == ["started", "ready"]
        assert pod.restarts() == 0


def test_a_killed_worker_is_replaced_from_the_state_without_a_restart_of_the_container(running: Pod) -> None:
    process, before = running.process(), running.target.status()["restarts"]
    with running.watch() as watched:
        assert watched.wait_for("ready", timeout=TIMEOUT)
        os.kill(running.workers()[0], signal.SIGKILL)
        wait_until(lambda: running.target.status()["restarts"] == before + 1)
        wait_until(lambda: running.target.get("/readyz")[0] == 200)
        assert request_speech(running.target, BODIES[1], streamed=True).outcome == "sound"
        assert running.target.status()["misses"] == {}
        assert not watched.killed
    assert (running.process(), running.restarts()) == (process, 0)


def test_a_hung_worker_is_replaced_without_a_restart_of_the_container(running: Pod) -> None:
    process, before = running.process(), running.target.status()["restarts"]
    with running.watch() as watched, ThreadPoolExecutor(1) as pool:
        assert watched.wait_for("ready", timeout=TIMEOUT)
        os.kill(running.workers()[0], signal.SIGSTOP)
        pending = pool.submit(request_speech, running.target, BODIES[0], streamed=False)
        wait_until(lambda: running.target.get("/readyz")[0] == 503)  # the pod is not ready without a worker
        wait_until(lambda: running.target.get("/readyz")[0] == 200)
        assert pending.result().outcome in {"sound", "refused"}
        assert running.target.status()["restarts"] == before + 1
        assert not watched.killed
    assert (running.process(), running.restarts()) == (process, 0)


def test_a_hung_server_is_restarted(running: Pod) -> None:
    process = running.process()
    with running.watch() as watched:
        assert watched.wait_for("ready", timeout=TIMEOUT)
        os.kill(process, signal.SIGSTOP)
        assert watched.wait_for("not ready", timeout=TIMEOUT)
        killed = watched.wait_for("killed", timeout=TIMEOUT)
        assert killed is not None
        assert killed.reason.startswith("liveness: /livez")
    began = time.monotonic()
    running.restart(killed)
    assert time.monotonic() - began < 60, "a hung server does not drain"
    with running.watch() as watched:
        wait_ready(running, watched)
        assert running.target.status()["misses"] == {}
    assert running.process() != process


def test_a_killed_server_is_restarted(running: Pod) -> None:
    process, before = running.process(), running.restarts()
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: running.restarts() == before + 1)
    with running.watch() as watched:
        wait_ready(running, watched)
        assert running.target.status()["misses"] == {}
    assert running.process() != process


def test_a_deleted_pod_finishes_its_requests(documents: list[Document], image_in_podman: str) -> None:
    with Pod(documents, name="drained", port=free_port(), image=image_in_podman) as pod, ThreadPoolExecutor(2) as pool:
        with pod.watch() as watched:
            wait_ready(pod, watched)
        # These requests take longer than preStop, so the last of them finish during the drain.
        long = {**BODIES[2], "max_new_tokens": 60}
        pending = [pool.submit(request_speech, pod.target, long, streamed=bool(number % 2)) for number in range(2)]
        wait_until(lambda: bool(pod.target.status()["workers"][0]["busy"]))
        assert pod.end() == 0
        drained = re.search(r"draining: (\d+)", pod.log())
        assert drained is not None
        assert int(drained[1]) > 0, "some requests were not finished after preStop"
        assert [one.result().outcome for one in pending] == ["sound"] * 2


def test_a_start_that_hangs_is_ended_by_the_startup_probe(documents: list[Document], image_in_podman: str) -> None:
    pod = Pod(documents, name="hung", port=free_port(), image=image_in_podman)
    # Limit the start to 15 s in this test instead of 6 minutes.
    pod.probes["startup"] = replace(pod.probes["startup"], failure_threshold=15)
    with pod, pod.watch() as watched:
        wait_until(lambda: any(b"serve.worker" in _command(pid) for pid in pod.workers()))
        os.kill(pod.workers()[0], signal.SIGSTOP)
        killed = watched.wait_for("killed", timeout=TIMEOUT)
        assert killed is not None
        assert killed.reason == "startup: /startupz: 503"
        assert [event.kind for event in watched.events] == ["killed"]


def _kernel_status(pod: Pod) -> dict[str, str]:
    """Return the fields of `/proc/PID/status` of the server."""
    lines = Path(f"/proc/{pod.process()}/status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _command(pid: int) -> bytes:
    """Return the command line of a process. Before its exec, it is that of its parent."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _in(pod: Pod, *command: str) -> str:
    """Return the output of a command in the container of the server."""
    arguments = ["podman", "exec", pod.container, *command]
    return subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
