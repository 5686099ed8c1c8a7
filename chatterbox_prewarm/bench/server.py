"""A server under measurement: started as a user would, watched through its own routes."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.upstream import read_bytes
from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.system.json_subprocess import end_with_parent
from chatterbox_prewarm.system.metrics import exec_time, now

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Ten times a second: often enough to see a stalled front, seldom enough to leave the worker its cores.
_POLL = 0.1


class MeasuredServer:
    """A `chatterbox-prewarm serve` process and what was seen of it. Times are seconds since it was executed."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self._log = log
        self.port = port
        self.origin = exec_time(process.pid)
        self.livez_first = 0.0
        self.livez_worst = 0.0
        self.livez_failed = 0
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch_livez, daemon=True)
        self._watching.set()
        self._watcher.start()

    def wait_ready(self, timeout: float = 600.0) -> dict[str, Any]:
        """Poll `/readyz` until it says 200; returns its body.

        Raises:
            ModelError: the server ended, or was not ready in time.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, body = self.request("GET", "/readyz")
                if status == 200:
                    self._watching.clear()
                    self._watcher.join()
                    ready: dict[str, Any] = json.loads(body)
                    return ready
            time.sleep(_POLL)
        raise ModelError(
            f"the server was not ready (exit status {self.process.poll()}): {self._log.read_text()[-2000:]}",
            next_step="see the end of its log above",
        )

    def speak(self, request: dict[str, Any]) -> tuple[bytes, float]:
        """Ask for speech; returns the WAV file and how long the answer took in seconds.

        Raises:
            ModelError: the server refused.
        """
        started = time.monotonic()
        status, body = self.request("POST", "/v1/audio/speech", json.dumps({**request, "response_format": "wav"}))
        if status != 200:
            raise ModelError(f"the server answered {status}: {body[:300]!r}", next_step="try it by hand")
        return body, time.monotonic() - started

    def since_exec(self) -> float:
        """Seconds since the process was executed."""
        return now() - self.origin

    def read_bytes(self) -> int:
        """Bytes that the server and its worker have read from storage."""
        return sum(read_bytes(pid) for pid in (self.process.pid, *self.workers()))

    def workers(self) -> list[int]:
        """The processes that the server has started and that still run, by their ids, whichever thread started them."""
        return children(self.process.pid)

    def request(self, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
        """One HTTP request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _watch_livez(self) -> None:
        while self._watching.is_set() and self.process.poll() is None:
            started = time.monotonic()
            try:
                status, _ = self.request("GET", "/livez")
            except (OSError, http.client.HTTPException):
                status = 0
            if self.livez_first:
                self.livez_failed += status != 200
                self.livez_worst = max(self.livez_worst, time.monotonic() - started)
            elif status == 200:
                self.livez_first = self.since_exec()
            time.sleep(_POLL)


@contextlib.contextmanager
def measured_server(arguments: Sequence[str], *, log: Path) -> Iterator[MeasuredServer]:
    """Start `chatterbox-prewarm serve` with `arguments` on a free port of loopback; ends it with SIGTERM."""
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_prewarm", "serve", "--port", str(port), *arguments],
            stdout=stream,
            stderr=stream,
            # A bench that is killed must not leave a server behind, with a lock on the cache.
            preexec_fn=lambda: end_with_parent(signal.SIGTERM),  # noqa: PLW1509 - a single call into the kernel
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
    """The processes that another has started and that still run, by their ids, whichever thread started them."""
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, tasks.read_text(encoding="ascii").split())
    return sorted(child for child in found if _state(child) not in "ZX")


def _state(pid: int) -> str:
    """The state of a process as `/proc/PID/stat` has it; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
