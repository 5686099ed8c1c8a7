"""Start a server process and send requests to it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.server import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping

SENTENCE: dict[str, Any] = {"input": "Hello, world.", "seed": 1, "max_new_tokens": 12, "response_format": "wav"}


class Server:
    """`chatterbox-prewarm serve` on a free port of the loopback interface."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self.port = free_port()
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "chatterbox_prewarm", "serve", "--port", str(self.port), *map(str, arguments)],
                stdout=stream,
                stderr=stream,
            )

    def ask(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        response, content = self.answer(method, path, body, headers)
        return response.status, content

    def answer(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def speak(self, **fields: Any) -> tuple[int, bytes]:
        return self.ask("POST", "/v1/audio/speech", json.dumps({**SENTENCE, **fields}))

    def status(self, path: str = "/readyz") -> tuple[int, dict[str, Any]]:
        status, body = self.ask("GET", path)
        parsed: dict[str, Any] = json.loads(body)
        return status, parsed

    def metric(self, name: str) -> float:
        """Return the sum of a metric over all label values."""
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        samples = [line for line in lines if line.partition("{")[0].partition(" ")[0] == f"chatterbox_prewarm_{name}"]
        assert samples, name
        return sum(float(line.rpartition(" ")[2]) for line in samples)

    def wait(self, path: str, wanted: int, seconds: float = 180.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                status, body = self.status(path)
            except OSError:
                status, body = 0, {}
            if status == wanted:
                return body
            time.sleep(0.05)
        raise AssertionError(f"{path} did not return {wanted} in time; {self.log.read_text()[-3000:]}")

    def wait_ready(self, workers: int = 1, seconds: float = 180.0) -> None:
        """Wait until this number of workers is ready."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            body = self.wait("/readyz", 200)
            if sum(worker["ready"] for worker in body["workers"]) >= workers:
                return
            time.sleep(0.1)
        raise AssertionError(f"fewer than {workers} workers became ready in time; {self.log.read_text()[-3000:]}")

    def wait_until_busy(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not any(worker["busy"] for worker in self.status()[1]["workers"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def workers(self) -> list[int]:
        """Return the process IDs of the workers."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in task.read_text().split()]

    def worker(self) -> int:
        return self.workers()[0]

    def wait_log(self, text: str, seconds: float = 20.0) -> str:
        """Wait until the log contains a text, and return the log. A request is logged after its response was sent."""
        deadline = time.monotonic() + seconds
        while text not in (log := self.log.read_text()):
            assert time.monotonic() < deadline, f"{text!r} is not in the log: {log[-3000:]}"
            time.sleep(0.02)
        return log

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=60)
