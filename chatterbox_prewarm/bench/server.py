"""A server process under measurement, observed through its own HTTP routes."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import Target, livez_probe
from chatterbox_prewarm.bench.upstream import read_bytes
from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.proof.probes import status_field
from chatterbox_prewarm.system.children import end_with_parent
from chatterbox_prewarm.system.metrics import exec_time, now

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Seconds between probes: short enough to see a front process that stalls, long enough to leave the worker its cores.
_POLL_SECONDS = 0.1


class MeasuredServer:
    """A `chatterbox-prewarm serve` process. All times are seconds since its exec.

    Attributes:
        target: address of the server.
        livez_first: time of the first 200 from `/livez`, known when the server is ready.
        livez_worst: highest latency of `/livez` after the first 200, in seconds.
        livez_failed: number of probes that failed after the first 200.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.target = Target(port=port)
        self.origin = exec_time(process.pid)
        self.livez_first = self.livez_worst = 0.0
        self.livez_failed = 0
        self._log = log

    def wait_ready(self, timeout: float = 600.0) -> dict[str, Any]:
        """Poll `/readyz` and `/livez` until the server is ready; return the body of `/readyz`.

        Raises:
            ModelError: the server ended, or was not ready within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with livez_probe(self.target, _POLL_SECONDS) as probes:
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status, body = self.target.get("/readyz", timeout=300)
                    if status == 200:
                        break
                time.sleep(_POLL_SECONDS)
            else:
                raise ModelError(
                    f"the server was not ready (exit status {self.process.poll()}): {self._log.read_text()[-2000:]}",
                    next_step="see the end of its log above",
                )
        self._summarize(probes)
        ready: dict[str, Any] = json.loads(body)
        return ready

    def _summarize(self, probes: Sequence[tuple[float, float | None]]) -> None:
        """Evaluate the probes from the first 200 on; until then the server does not listen yet."""
        first = next((index for index, (_, latency) in enumerate(probes) if latency is not None), None)
        if first is None:
            return
        self.livez_first = probes[first][0] - self.origin
        later = [latency for _, latency in probes[first + 1 :]]
        self.livez_worst = max((latency for latency in later if latency is not None), default=0.0)
        self.livez_failed = later.count(None)

    def speak(self, request: dict[str, Any]) -> tuple[bytes, float]:
        """Request speech; return the WAV file and the seconds until it was complete.

        Raises:
            ModelError: the status of the response was not 200.
        """
        started = time.monotonic()
        with contextlib.closing(self.target.connect(timeout=300)) as connection:
            body = json.dumps({**request, "response_format": "wav"})
            connection.request("POST", "/v1/audio/speech", body, self.target.headers)
            response = connection.getresponse()
            content = response.read()
        if response.status != 200:
            raise ModelError(f"the server returned {response.status}: {content[:300]!r}", next_step="see its log")
        return content, time.monotonic() - started

    def since_exec(self) -> float:
        """Return the seconds since the process was executed."""
        return now() - self.origin

    def read_bytes(self) -> int:
        """Return the number of bytes that the server and its workers have read from storage."""
        return sum(read_bytes(pid) for pid in (self.process.pid, *self.workers()))

    def resident_bytes(self) -> int:
        """Return the sum of the peak resident memory of the server and its workers. Shared pages count in each."""
        return sum(1024 * (status_field(pid, "VmHWM") or 0) for pid in (self.process.pid, *self.workers()))

    def workers(self) -> list[int]:
        """Return the process IDs of the workers that are running."""
        return children(self.process.pid)


@contextlib.contextmanager
def measured_server(arguments: Sequence[str], *, log: Path) -> Iterator[MeasuredServer]:
    """Run `chatterbox-prewarm serve` with `arguments` on a free local port; end it with SIGTERM."""
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_prewarm", "serve", "--port", str(port), *arguments],
            stdout=stream,
            stderr=stream,
            # A benchmark that is killed must not leave a server behind, because the server locks the cache.
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - a single system call
        )
        try:
            yield MeasuredServer(process, port, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def children(pid: int) -> list[int]:
    """Return the IDs of the running child processes of `pid`, for all its threads."""
    pids: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            pids += map(int, tasks.read_text(encoding="ascii").split())
    return sorted(child for child in pids if _process_state(child) not in "ZX")


def _process_state(pid: int) -> str:
    """Return the state letter from `/proc/PID/stat`; X if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def free_port() -> int:
    """Return a local port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
