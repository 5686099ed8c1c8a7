"""`benchmarks containers`: pull an image into an empty containerd, and start containers from it, one or several.

Containerd is what most Kubernetes nodes run. The image comes from a registry on the loopback interface, once with gzip
and once with zstd layers, so the seconds of a pull are those of unpacking. Each start is measured from the call of the
container runtime.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.append import registry
from chatterbox_prewarm.bench.clients import Target, request_speech
from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.bench.starts import SCRATCH, drop_page_cache, machine
from chatterbox_prewarm.errors import EngineError, ModelError
from chatterbox_prewarm.system.paths import CACHE
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

COMPRESSIONS = ("gzip", "zstd")
#: The request after a start. Random weights never stop, so it limits its tokens.
_REQUEST = {"input": "Hello, world.", "seed": 7, "max_new_tokens": 12}
_READY_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class _Containerd:
    """A separate containerd with an empty store."""

    address: Path

    def ctr(self, *arguments: str) -> str:
        """Run `ctr` and return its output.

        Raises:
            EngineError: the command failed.
        """
        command = ["ctr", "--address", str(self.address), "--namespace", "bench", *arguments]
        finished = run_process(command, stderr=subprocess.PIPE)
        if finished.returncode != 0:
            raise EngineError(
                f"ctr {arguments[0]} ended with status {finished.returncode}: {finished.stderr[-1000:]}",
                next_step="see its message above",
            )
        return finished.stdout


def run(image: str, *, counts: Sequence[int], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure pulls and starts of an image in Docker's store.

    Args:
        image: its name.
        counts: numbers of containers to start at once.
        rounds: repetitions of the starts of a single container with hot and with cold page cache.
        say: called with one line for each step.

    Returns:
        the machine, bytes and seconds of a pull for each compression, and for each kind of start the seconds until
        ready and until the first audio, and the memory of each container (`Pss`: shared pages count in parts).

    Raises:
        EngineError: a program is missing, or a step failed.
        ModelError: a container was not ready.
    """
    for program in ("skopeo", "ctr", "containerd"):
        if shutil.which(program) is None:
            raise EngineError(f"{program} is not installed", next_step="apt-get install containerd skopeo")
    pulls = {}
    for compression in COMPRESSIONS:
        # Each has its own registry: skopeo would use the layers again that it has pushed with another compression.
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, registry(Path(folder)) as address:
            reference = f"{address}/image:{compression}"
            say(f"push with {compression}")
            _push(image, reference, compression)
            with _containerd() as engine:
                say(f"pull with {compression}")
                pulls[compression] = _pull(engine, reference)
                say(f"pulled {pulls[compression]['bytes'] / 1e6:.0f} MB in {pulls[compression]['seconds']} s")
                if compression != COMPRESSIONS[-1]:
                    continue
                say("start right after the pull")
                starts = {"after the pull": [_start(engine, reference)]}
                starts["cold page cache"] = [_start(engine, reference, cold=True) for _ in range(rounds)]
                starts["hot page cache"] = [_start(engine, reference) for _ in range(rounds)]
                for count in counts:
                    say(f"{count} at once")
                    starts[f"{count} at once"] = _start_at_once(engine, reference, count)
    return {"machine": machine(), "containerd": _version(), "pulls": pulls, "starts": starts}


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    lines = [
        f"{name:16} {pull['bytes'] / 1e6:8.0f} MB in {len(pull['layers'])} layers, pulled in {pull['seconds']:.1f} s"
        for name, pull in report["pulls"].items()
    ]
    for layers in zip(*(pull["layers"] for pull in report["pulls"].values()), strict=True):
        sizes = " ".join(f"{layer['bytes'] / 1e6:8.1f}" for layer in layers)
        lines.append(f"{sizes} MB  {layers[0]['step'][:80]}")
    for name, starts in report["starts"].items():
        ready, audio, memory = (
            statistics.median(start[figure] for start in starts) for figure in ("ready", "first_audio", "pss_bytes")
        )
        lines.append(f"{name:16} ready {ready:6.1f} s, first audio {audio:6.1f} s, memory {memory / 1e6:6.0f} MB each")
    return "\n".join(lines)


def _push(image: str, reference: str, compression: str) -> None:
    source = f"docker-daemon:{image if ':' in image.rpartition('/')[2] else f'{image}:latest'}"
    host = os.environ.get("DOCKER_HOST")
    finished = run_process(
        [
            *("skopeo", "--insecure-policy", "copy", "--quiet", "--format=oci", "--dest-tls-verify=false"),
            *(("--src-daemon-host", host) if host else ()),
            *(f"--dest-compress-format={compression}", "--dest-compress", source, f"docker://{reference}"),
        ],
        stderr=subprocess.PIPE,
    )
    if finished.returncode != 0:
        raise EngineError(f"skopeo could not copy {image}: {finished.stderr[-1000:]}", next_step="see its message")


def _pull(engine: _Containerd, reference: str) -> dict[str, Any]:
    started = time.monotonic()
    engine.ctr("images", "pull", "--plain-http", reference)
    seconds = time.monotonic() - started
    layers = _layers(reference)
    return {"seconds": round(seconds, 1), "bytes": sum(layer["bytes"] for layer in layers), "layers": layers}


def _layers(reference: str) -> list[dict[str, Any]]:
    """Return the compressed bytes of each layer of an image in a registry, and the build step that made it."""
    manifest, config = (
        json.loads(run_process(["skopeo", "inspect", what, "--tls-verify=false", f"docker://{reference}"]).stdout)
        for what in ("--raw", "--config")
    )
    steps = [step.get("created_by", "") for step in config["history"] if not step.get("empty_layer")]
    return [
        {"bytes": layer["size"], "step": " ".join(step.split())}
        for layer, step in zip(manifest["layers"], steps, strict=True)
    ]


def _start_at_once(engine: _Containerd, reference: str, count: int) -> list[dict[str, float]]:
    ports: set[int] = set()
    while len(ports) < count:  # a port is free until its server listens, so it can be returned twice
        ports.add(free_port())
    together = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda port: _start(engine, reference, port=port, together=together), ports))


def _start(
    engine: _Containerd,
    reference: str,
    *,
    cold: bool = False,
    port: int | None = None,
    together: threading.Barrier | None = None,
) -> dict[str, float]:
    """Start a container, read-only, as the image's user and on the host's network; ask it to speak, and remove it.

    The memory is measured when all containers of the barrier `together` have answered and none is removed, because they
    share pages.
    """
    if cold:
        drop_page_cache()
    port, together = port or free_port(), together or threading.Barrier(1)
    name, target = f"start-{port}", Target(port=port)
    tmpfs = [f"--mount=type=tmpfs,src=tmpfs,dst={path},options=mode=1777:exec" for path in ("/tmp", str(CACHE))]  # noqa: S108
    started = time.monotonic()
    engine.ctr(
        *("run", "--detach", "--net-host", "--read-only", *tmpfs),
        *(f"--env=CHATTERBOX_PREWARM_PORT={port}", reference, name),
    )
    try:
        _wait_ready(target, started)
        ready = time.monotonic() - started
        answer = request_speech(target, _REQUEST, streamed=False)
        if answer.status != 200:
            raise ModelError(f"a container answered {answer.status}: {answer.text}", next_step="see its log")
        first_audio = time.monotonic() - started
        together.wait()
        memory = float(_pss(_processes(engine, name)))
        together.wait()
        return {"ready": ready, "first_audio": first_audio, "pss_bytes": memory}
    finally:
        together.abort()  # so that no container waits for one that failed
        for kind in (("tasks", "delete", "--force"), ("containers", "delete")):
            with contextlib.suppress(EngineError):
                engine.ctr(*kind, name)


def _wait_ready(target: Target, started: float) -> None:
    while time.monotonic() < started + _READY_SECONDS:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if target.get("/readyz")[0] == 200:
                return
        time.sleep(0.02)
    raise ModelError(f"a container was not ready after {_READY_SECONDS:.0f} s", next_step="start it by hand")


def _processes(engine: _Containerd, name: str) -> list[int]:
    """Return the process IDs of a container."""
    lines = engine.ctr("tasks", "ps", name).splitlines()[1:]
    return [int(line.split()[0]) for line in lines]


def _pss(pids: Sequence[int]) -> int:
    """Return the proportional set size of processes in bytes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
    return total


@contextlib.contextmanager
def _containerd() -> Iterator[_Containerd]:
    """Run a containerd with an empty store, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
        root = Path(scratch)
        engine = _Containerd(address=root / "socket")
        config = root / "config.toml"
        config.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n', encoding="utf-8")
        paths = {"root": root / "root", "state": root / "state", "address": engine.address, "config": config}
        command = ["containerd", *(f"--{name}={path}" for name, path in paths.items())]
        with (root / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
            try:
                for _ in range(100):
                    if engine.address.exists():
                        break
                    time.sleep(0.1)
                else:
                    raise EngineError("containerd did not start", next_step=(root / "log").read_text()[-500:])
                yield engine
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=60)


def _version() -> str:
    return run_process(["containerd", "--version"]).stdout.split()[2]
