"""All routes together, over HTTP, with a stand-in for the worker's process: who is taken on, and when nobody is."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import uvicorn

from chatterbox_prewarm.serve.http import encoding
from chatterbox_prewarm.serve.http.admission import Admission, CloseWhileDraining
from chatterbox_prewarm.serve.http.app import App, description
from chatterbox_prewarm.serve.http.schemas import Status
from chatterbox_prewarm.serve.http.speech_route import encoded
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.serve.workers.messages import Chunk
from chatterbox_prewarm.serve.workers.pool import Pool, PoolConfig
from tests.helpers.added_voices import VARIANT, WEIGHTS, sound_file, tone
from tests.helpers.http_server import ask, connect
from tests.helpers.stand_in_worker import CONFIG, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    Answer = tuple[http.client.HTTPResponse, bytes]

SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"
ORDER = json.dumps({"input": "Hello.", "response_format": "pcm", "seed": 1})
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nann\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="c"\r\n\r\n'
    + sound_file(tone(1.5), kind="FLAC")
    + b"\r\n--b--\r\n"
)


class Server:
    """The application on a port, with a worker that plays a part."""

    def __init__(self, directory: Path, part: str, limit: int) -> None:
        self.pool = Pool(PoolConfig(wait_seconds=20, hang_seconds=20), [(CONFIG, start(part)(CONFIG))])
        self.admission = Admission(self.pool, limit=limit)
        store = VoiceStore(directory, baked={}, variant=VARIANT, weights=WEIGHTS)
        app = App(self.pool, self.admission, store, max_characters=500).asgi()
        config = uvicorn.Config(
            CloseWhileDraining(app, self.admission), lifespan="off", log_config=None, access_log=False
        )
        self._server = uvicorn.Server(config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    async def _run(self) -> None:
        supervision = asyncio.create_task(self.pool.run())
        await self._server.serve([self._listener])
        await self.pool.stop()
        await supervision

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive()

    def speak(self) -> Answer:
        return ask(self.port, "POST", SPEECH, body=ORDER)

    def upload(self) -> Answer:
        return ask(self.port, "POST", VOICES, {"Content-Type": "multipart/form-data; boundary=b"}, FORM)

    def metric(self, name: str) -> float:
        text = ask(self.port, "GET", "/metrics")[1].decode()
        found = re.search(rf"^chatterbox_prewarm_{name} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server; returns when its worker is ready, if it ever will be."""
    servers: list[Server] = []

    def begin(part: str, *, limit: int = 32) -> Server:
        servers.append(Server(tmp_path, part, limit))
        if part in {"ready", "slow", "stuck"}:
            servers[-1].until(lambda: servers[-1].pool.ready)
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def refused(answer: Answer, status: int, code: str) -> None:
    response, body = answer
    assert (response.status, json.loads(body)["error"]["code"]) == (status, code)
    assert int(response.headers["Retry-After"]) >= 1


def test_before_a_worker_is_ready_neither_speech_nor_an_upload_is_taken_on(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    refused(server.speak(), 503, "not_ready")
    refused(server.upload(), 503, "not_ready")


def test_an_upload_is_refused_before_its_body_is_read(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    head = b"POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
    with connect(server.port, head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n") as upload:
        assert upload.recv(100).startswith(b"HTTP/1.1 503")


def test_an_upload_takes_a_place_in_the_queue(serve: Callable[..., Server]) -> None:
    server = serve("slow", limit=1)
    assert server.metric("queue_limit") == 1
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.upload)
        server.until(lambda: server.metric("requests_in_flight") == 1)
        refused(server.speak(), 429, "queue_full")
        refused(server.upload(), 429, "queue_full")
        assert first.result()[0].status == 201
    assert server.metric("requests_in_flight") == 0
    assert server.speak()[1] == b"Hello."


def test_a_drain_waits_for_an_upload_and_refuses_the_next(serve: Callable[..., Server]) -> None:
    server = serve("slow")
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.upload)
        server.until(lambda: server.metric("requests_in_flight") == 1)
        server.admission.draining = True
        refused(server.upload(), 503, "draining")
        assert asyncio.run(server.admission.drained(20))
        assert first.result()[0].status == 201


def test_a_draining_server_keeps_no_connection(serve: Callable[..., Server]) -> None:
    server = serve("ready")
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    seen = []
    for draining in (False, True):
        server.admission.draining = draining
        client.request("POST", SPEECH, ORDER)
        answer = client.getresponse()
        answer.read()
        seen.append((answer.status, answer.headers["Connection"], client.sock is None))
    client.close()
    assert seen == [(200, None, False), (503, "close", True)]
    probe = ask(server.port, "GET", "/livez")[0]
    assert (probe.status, probe.headers["Connection"]) == (200, "close")


def test_a_worker_that_died_in_a_drain_ends_its_request_at_once(serve: Callable[..., Server]) -> None:
    server = serve("stuck")
    with ThreadPoolExecutor() as clients:
        requests = [clients.submit(server.speak) for _ in range(2)]
        server.until(lambda: server.metric("requests_in_flight") == 2)
        server.until(lambda: server.pool.waiting == 1)
        server.admission.draining = True
        server.pool.close()
        os.kill(server.pool.workers[0].pid, signal.SIGKILL)
        began = time.monotonic()
        for request in requests:
            refused(request.result(), 503, "worker_gone")
        assert time.monotonic() - began < 10


def test_why_a_worker_failed_its_start_is_shown(serve: Callable[..., Server]) -> None:
    server = serve("weights")
    server.until(lambda: server.pool.failure)
    answer, body = ask(server.port, "GET", "/startupz")
    (worker,) = Status.model_validate_json(body).workers
    assert (answer.status, worker.phase, worker.reason) == (503, "failed", "the weights are gone")


def test_the_description_is_built_once(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    first, second = (ask(server.port, "GET", "/openapi.json") for _ in range(2))
    assert first[1] == second[1] == description(500)
    assert description(500) is description(500)
    assert first[0].headers["Content-Type"] == "application/json"
    assert json.loads(first[1])["components"]["schemas"]["SpeechRequest"]["properties"]["input"]["maxLength"] == 500


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["flac", "mp3", "opus"])
def test_sound_is_encoded_outside_the_event_loop(name: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encoding.encoder
    threads: set[int] = set()

    class Watched:
        def __init__(self, audio_format: str, *, whole: bool) -> None:
            threads.add(threading.get_ident())
            self._real = real(audio_format, whole=whole)
            self.media_type = self._real.media_type

        def encode(self, pcm: bytes) -> bytes:
            threads.add(threading.get_ident())
            return self._real.encode(pcm)

        def finish(self) -> bytes:
            threads.add(threading.get_ident())
            return self._real.finish()

    monkeypatch.setattr(encoding, "encoder", Watched)

    async def chunks() -> AsyncIterator[Chunk]:
        for _ in range(3):
            yield Chunk(pcm=bytes(48_000), tokens=25)

    async def sound() -> bytes:
        _, parts = await encoded(name, chunks(), whole=whole)
        return b"".join([part async for part in parts])

    assert len(asyncio.run(sound())) > 100
    assert threads
    assert threading.get_ident() not in threads
