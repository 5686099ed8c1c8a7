"""The rendered cpu-demo runs: podman plays it with the built image, and the kubelet's rules are applied to its probes.

Nothing is started again that should not be, and all is that should.
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
from chatterbox_prewarm.bench.clients import ask, mix
from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.system.paths import WARM
from tests.conftest import run_cli
from tests.helpers.manifests import K8S, kustomize, the

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.helpers.manifests import Document
    from tests.image.conftest import Storage

#: Of a short, a medium and a long text; random weights never stop.
TOKENS = (6, 12, 25)
ORDERS = mix(TOKENS, 2, voice=DEFAULT_VOICE)
#: Seconds that a worker may be silent, so that nobody waits two minutes here.
HANG = {"CHATTERBOX_PREWARM_HANG_SECONDS": "5"}
PATIENCE = 120.0


@pytest.fixture(scope="module")
def played(storage: Storage, image: str) -> str:
    """The image, which podman has as well."""
    helpers = f"{os.environ['PATH']}:/usr/lib/podman:/usr/libexec/podman"
    if not all(shutil.which(name, path=helpers) for name in ("netavark", "catatonit")):
        pytest.skip("podman has no pods without netavark and catatonit (Debian: apt-get install netavark catatonit)")
    assert storage.root.is_dir()
    give_to_podman(image)
    return image


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """As they are, but for threads that spin while they wait: those take the processors from other tests."""
    found = kustomize(K8S / "overlays" / "cpu-demo")
    the(found, "ConfigMap")["data"]["OMP_WAIT_POLICY"] = "passive"
    return found


@pytest.fixture(scope="module")
def running(documents: list[Document], played: str) -> Iterator[Pod]:
    """A pod that is warm and ready; each test leaves it so, whatever became of its processes."""
    with Pod(documents, name="running", port=free_port(), image=played, settings=HANG) as pod:
        with pod.watch() as watched:
            wait_ready(pod, watched)
        yield pod


@pytest.fixture
def state(docker: str, image: str, tmp_path: Path) -> Path:
    """A copy of the image's warm state."""
    container = subprocess.run([docker, "create", image], capture_output=True, text=True, check=True).stdout.strip()
    try:
        subprocess.run([docker, "cp", f"{container}:{WARM}", tmp_path / "warm"], check=True, capture_output=True)
    finally:
        subprocess.run([docker, "rm", container], capture_output=True, check=True)
    tmp_path.chmod(0o755)
    return tmp_path / "warm"


def wait_until(what: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_starts_are_warm_or_slow_and_an_update_loses_nothing(
    documents: list[Document], played: str, tmp_path: Path
) -> None:
    manifests, output = tmp_path / "demo.yaml", tmp_path / "pods.json"
    manifests.write_text(yaml.safe_dump_all(documents))
    # As much as two pods on two cores speak within the drain of 100 s.
    arguments = ("--rounds", "1", "--tokens", "6,6,6", "--clients", "2", "--output", output)
    made = run_cli("bench", "pods", "--manifests", manifests, "--image", played, *arguments, timeout=900)
    assert made.returncode == 0, made.stdout + made.stderr[-5000:]
    report = json.loads(output.read_text())
    (warm,), (cold,) = report["starts"]["warm"], report["starts"]["cold"]
    assert warm["misses"] == {}
    assert warm["hits"]["numba"] > 0
    assert cold["hits"] == {}
    assert cold["profile"] == "eager"
    assert warm["restarts"] == cold["restarts"] == 0
    assert 0 < warm["since_exec"]["ready"] <= warm["ready"] + 1, "the kubelet sees it no sooner than it is so"
    assert {"warm", "cold"} == report["ready"].keys()
    update = report["update"]
    assert update["sound"] == update["answers"] > 2 * update["clients"]
    assert (update["old_exit_code"], update["killed"], update["misses"]) == (0, False, {})


def test_the_container_is_what_the_manifest_says(running: Pod) -> None:
    status = _kernel_status(running)
    assert (status["Uid"].split(), status["Gid"].split()) == (["12345"] * 4, ["12345"] * 4)
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    cache = "/var/cache/chatterbox-prewarm"
    script = f"touch /opt/x /tmp/x {cache}/x; cp /bin/true {cache}/run && {cache}/run && echo executed; rm {cache}/run"
    said = _in(running, "sh", "-c", f"{script}; ls /var/run/secrets; env")
    assert "touch: cannot touch '/opt/x': Read-only file system" in said
    assert said.count("cannot touch") == 1
    assert "executed" in said, "libraries are loaded from the cache"
    assert "'/var/run/secrets': No such file or directory" in said
    assert "NVIDIA_VISIBLE_DEVICES" not in said


def test_a_corrupted_state_is_a_slow_start_and_no_crash_loop(
    documents: list[Document], played: str, state: Path
) -> None:
    damaged = max(state.rglob("aot/*/region.so"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(content)
    with (
        Pod(documents, name="corrupted", port=free_port(), image=played, folders={str(WARM): state}) as pod,
        pod.watch() as watched,
    ):
        wait_ready(pod, watched)
        status = pod.target.status()
        assert status["misses"].keys() == {"aot"}
        assert status["hits"].keys() >= {"numba", "conditionals"}, "what is whole is used"
        assert "miss in aot" in pod.log()
        assert ask(pod.target, ORDERS[0], streamed=False).outcome == "sound"
        assert [event.what for event in watched.events] == ["started", "ready"]
        assert pod.restarts() == 0


def test_a_killed_worker_is_replaced_from_the_state_and_the_container_stays(running: Pod) -> None:
    process, before = running.process(), running.target.status()["restarts"]
    with running.watch() as watched:
        assert watched.wait_for("ready", timeout=PATIENCE)
        os.kill(running.workers()[0], signal.SIGKILL)
        wait_until(lambda: running.target.status()["restarts"] == before + 1)
        wait_until(lambda: running.target.get("/readyz")[0] == 200)
        assert ask(running.target, ORDERS[1], streamed=True).outcome == "sound"
        assert running.target.status()["misses"] == {}
        assert not watched.killed
    assert (running.process(), running.restarts()) == (process, 0)


def test_a_hung_worker_is_replaced_and_the_container_stays(running: Pod) -> None:
    process, before = running.process(), running.target.status()["restarts"]
    with running.watch() as watched, ThreadPoolExecutor(1) as pool:
        assert watched.wait_for("ready", timeout=PATIENCE)
        os.kill(running.workers()[0], signal.SIGSTOP)
        asked = pool.submit(ask, running.target, ORDERS[0], streamed=False)
        wait_until(lambda: running.target.get("/readyz")[0] == 503)  # readiness follows
        wait_until(lambda: running.target.get("/readyz")[0] == 200)
        assert asked.result().outcome in {"sound", "refused"}
        assert running.target.status()["restarts"] == before + 1
        assert not watched.killed
    assert (running.process(), running.restarts()) == (process, 0)


def test_a_hung_server_is_ended_and_started_again(running: Pod) -> None:
    process = running.process()
    with running.watch() as watched:
        assert watched.wait_for("ready", timeout=PATIENCE)
        os.kill(process, signal.SIGSTOP)
        assert watched.wait_for("not ready", timeout=PATIENCE)
        killed = watched.wait_for("killed", timeout=PATIENCE)
        assert killed is not None
        assert killed.why.startswith("liveness: /livez")
    began = time.monotonic()
    running.restart(killed)
    assert time.monotonic() - began < 60, "nothing is drained"
    with running.watch() as watched:
        wait_ready(running, watched)
        assert running.target.status()["misses"] == {}
    assert running.process() != process


def test_a_server_that_died_is_started_again(running: Pod) -> None:
    process, before = running.process(), running.restarts()
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: running.restarts() == before + 1)
    with running.watch() as watched:
        wait_ready(running, watched)
        assert running.target.status()["misses"] == {}
    assert running.process() != process


def test_a_pod_that_is_deleted_finishes_what_it_was_asked_for(documents: list[Document], played: str) -> None:
    with Pod(documents, name="drained", port=free_port(), image=played) as pod, ThreadPoolExecutor(2) as pool:
        with pod.watch() as watched:
            wait_ready(pod, watched)
        # Longer than preStop takes, so that the last of them are spoken during the drain.
        long = {**ORDERS[2], "max_new_tokens": 60}
        asked = [pool.submit(ask, pod.target, long, streamed=bool(number % 2)) for number in range(2)]
        wait_until(lambda: bool(pod.target.status()["workers"][0]["busy"]))
        assert pod.end() == 0
        drained = re.search(r"draining: (\d+)", pod.log())
        assert drained is not None
        assert int(drained[1]) > 0, "some were left when preStop was over"
        assert [one.result().outcome for one in asked] == ["sound"] * 2


def test_a_start_that_does_not_end_is_ended_by_the_startup_probe(documents: list[Document], played: str) -> None:
    pod = Pod(documents, name="hung", port=free_port(), image=played)
    # A budget of 15 s for this test; the manifest's is 6 minutes.
    pod.probes["startup"] = replace(pod.probes["startup"], failure_threshold=15)
    with pod, pod.watch() as watched:
        wait_until(lambda: any(b"serve.worker" in _command(pid) for pid in pod.workers()))
        os.kill(pod.workers()[0], signal.SIGSTOP)
        killed = watched.wait_for("killed", timeout=PATIENCE)
        assert killed is not None
        assert killed.why == "startup: /startupz: 503"
        assert [event.what for event in watched.events] == ["killed"]


def _kernel_status(pod: Pod) -> dict[str, str]:
    """Of the server's process, as the kernel tells."""
    lines = Path(f"/proc/{pod.process()}/status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _command(pid: int) -> bytes:
    """The command line of a process; until it has called exec, that of its parent."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _in(pod: Pod, *command: str) -> str:
    """What a command in the server's container prints."""
    asked = ["podman", "exec", pod.container, *command]
    return subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout
