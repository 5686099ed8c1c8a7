"""The complete application over HTTP with a simulated worker process: admission, drain, metrics and status."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import uvicorn
from pydantic import TypeAdapter

from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.serve.http import audio_response, encoding, request_body
from chatterbox_prewarm.serve.http.access import check_access
from chatterbox_prewarm.serve.http.admission import Admission, close_while_draining
from chatterbox_prewarm.serve.http.app import App
from chatterbox_prewarm.serve.http.audio_response import encoded
from chatterbox_prewarm.serve.http.cross_origin import Sites
from chatterbox_prewarm.serve.http.openapi import encoded_document
from chatterbox_prewarm.serve.http.request_log import log_requests
from chatterbox_prewarm.serve.http.schemas import Status
from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.serve.workers import audio_buffer
from chatterbox_prewarm.serve.workers.messages import Chunk
from chatterbox_prewarm.serve.workers.pool import Pool
from chatterbox_prewarm.serve.workers.pools import Pools
from chatterbox_prewarm.serve.workers.worker_config import for_devices
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL
from tests.conftest import ROOT
from tests.helpers.added_voices import WEIGHTS, sound_file, tone
from tests.helpers.added_voices import voice as voice_file
from tests.helpers.http_server import connect, request
from tests.helpers.stand_in_worker import CONFIG, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    Response = tuple[http.client.HTTPResponse, bytes]

SPEECH, VOICES, CONVERSIONS = "/v1/audio/speech", "/v1/audio/voices", "/v1/audio/conversions"
BODY = json.dumps({"input": "Hello.", "response_format": "pcm", "seed": 1})
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nann\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="c"\r\n\r\n'
    + sound_file(tone(1.5), kind="FLAC")
    + b"\r\n--b--\r\n"
)


class Server:
    """The application on a port, with a worker process that plays the given part."""

    def __init__(
        self,
        directory: Path,
        part: str,
        *,
        limit: int,
        wait_seconds: float,
        sites: Sites | None = None,
        **settings: Any,
    ) -> None:
        rules = SpeechRules(max_characters=500, **settings)
        variant = rules.variants[0].name
        store = VoiceStore(directory, {variant: WEIGHTS}, aliases={"John Smith=Bob": "default"})
        self.pools = Pools(
            [
                Pool(
                    [(config, start(part)(config))],
                    model=config.pool,
                    wait_seconds=wait_seconds,
                    hang_seconds=600,
                    voices=store,
                )
                for config in for_devices(["cpu"], replace(CONFIG, model=variant), convert=rules.converts)
            ]
        )
        self.pool = self.pools.first
        self.admission = Admission(self.pools, limit=limit)
        app = App(self.pools, self.admission, store, rules).asgi()
        config = uvicorn.Config(
            log_requests(close_while_draining(check_access(app, None, sites), self.admission), app.routes),
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        self._server = uvicorn.Server(config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    async def _run(self) -> None:
        supervision = asyncio.create_task(self.pools.run())
        await self._server.serve([self._listener])
        await self.pools.stop()
        await supervision

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive()

    def speak(self, **fields: object) -> Response:
        return request(self.port, "POST", SPEECH, body=json.dumps({**json.loads(BODY), **fields}))

    def upload(self) -> Response:
        return request(self.port, "POST", VOICES, {"Content-Type": "multipart/form-data; boundary=b"}, FORM)

    def metric(self, name: str) -> float:
        text = request(self.port, "GET", "/metrics")[1].decode()
        pattern = rf'^chatterbox_prewarm_{name}({{model="[a-z]+"}})? (\S+)$'
        match = re.search(pattern, text, re.MULTILINE)
        assert match, text
        return float(match[2])

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server and waits for its worker, unless the worker never becomes ready."""
    servers: list[Server] = []

    def start_server(part: str, *, limit: int = 32, wait_seconds: float = 20, **settings: Any) -> Server:
        servers.append(Server(tmp_path, part, limit=limit, wait_seconds=wait_seconds, **settings))
        if part in {"ready", "slow", "stuck"}:
            servers[-1].wait_until(lambda: all(pool.ready for pool in servers[-1].pools))
        return servers[-1]

    yield start_server
    for server in servers:
        server.close()


def assert_refused(result: Response, status: int, code: str) -> None:
    response, body = result
    assert (response.status, json.loads(body)["error"]["code"]) == (status, code)
    assert int(response.headers["Retry-After"]) >= 1


def test_requests_are_refused_before_a_worker_is_ready(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    assert_refused(server.speak(), 503, "not_ready")
    assert_refused(server.upload(), 503, "not_ready")


def test_an_upload_is_refused_before_its_body_is_read(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    head = b"POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
    with connect(server.port, head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n") as upload:
        assert upload.recv(100).startswith(b"HTTP/1.1 503")


@pytest.fixture
def slow_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a second for a voice, without a model."""

    async def make_voice(*_: object) -> bytes:
        await asyncio.sleep(1)
        return voice_file()

    monkeypatch.setattr("chatterbox_prewarm.serve.workers.pools.make_voice", make_voice)


@pytest.mark.usefixtures("slow_voice")
def test_an_upload_counts_toward_the_queue_limit(serve: Callable[..., Server]) -> None:
    server = serve("slow", limit=1)
    assert server.metric("queue_limit") == 1
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.upload)
        server.wait_until(lambda: server.metric("requests_in_flight") == 1)
        assert_refused(server.speak(), 429, "queue_full")
        assert_refused(server.upload(), 429, "queue_full")
        assert first.result()[0].status == 201
    assert server.metric("requests_in_flight") == 0
    assert server.speak()[1] == b"Hello."


def test_an_unknown_voice_is_refused_with_the_name_of_the_field_and_the_option(serve: Callable[..., Server]) -> None:
    server = serve("ready")
    for voice in ("Emily.wav", "nobody", {"id": "../x"}):
        response, body = server.speak(voice=voice)
        error = json.loads(body)["error"]
        assert (response.status, error["code"], error["param"]) == (404, "voice_not_found", "voice")
        advice = "choose one of: default, or add it with POST /v1/audio/voices, or start the server with --voice-alias"
        assert advice in error["message"]
    assert server.speak(voice="John Smith=Bob")[0].status == 200


def test_the_model_can_be_requested_by_name(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    (listed,) = json.loads(request(server.port, "GET", "/v1/models")[1])["data"]
    response, body = request(server.port, "GET", f"/v1/models/{listed['id']}")
    assert (response.status, json.loads(body)) == (200, listed)
    assert request(server.port, "GET", "/v1/models/tts-1")[1] == body
    for name in ("resemble-ai/chatterbox", "resemble-ai%2Fchatterbox", "x" * 5000):
        response, body = request(server.port, "GET", f"/v1/models/{name}")
        error = json.loads(body)["error"]
        assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["message"].endswith("this server has english")
        assert len(error["message"]) < 300


def test_a_compressed_body_is_refused_with_the_name_of_its_encoding(serve: Callable[..., Server]) -> None:
    server = serve("ready")
    compressed = gzip.compress(BODY.encode())
    for path in (SPEECH, VOICES):
        for name in ("gzip", "identity, GZIP", "br"):
            response, body = request(server.port, "POST", path, {"Content-Encoding": name}, compressed)
            error = json.loads(body)["error"]
            assert (response.status, error["code"]) == (415, "unsupported_encoding")
            assert name.split()[-1] in error["message"]
    assert request(server.port, "POST", SPEECH, {"Content-Encoding": "identity"}, BODY)[0].status == 200


def test_speech_that_reaches_the_token_limit_is_reported(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve("ready")
    whole, cut = "Hello.", "An endless word."
    late = "x" * 280 + " " + cut  # only the second part reaches the limit, which the head of a stream cannot tell

    def reason(text: str, audio_format: str) -> str | None:
        return server.speak(input=text, response_format=audio_format)[0].headers["X-Finish-Reason"]

    def last_event(text: str) -> Any:
        events = server.speak(input=text, response_format="pcm", stream_format="sse")[1].decode().split("\n\n")
        return json.loads(events[-2].removeprefix("data: "))["finish_reason"]

    assert [reason(text, "wav") for text in (whole, cut, late)] == ["stop", "length", "length"]
    assert [reason(text, "pcm") for text in (whole, cut, late)] == [None, "length", None]
    assert server.metric("truncated_parts_total") == 4
    assert [last_event(text) for text in (whole, cut, late)] == ["stop", "length", "length"]
    with caplog.at_level(logging.INFO):
        reason(late, "wav")
        server.wait_until(lambda: any(getattr(record, "fields", {}).get("truncated") == 1 for record in caplog.records))


def test_a_client_learns_how_many_parts_were_left_out(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("regex")
    pytest.importorskip("sentencex")
    server = serve("ready")
    spoken = "x" * 280
    # The head of a stream is sent with the first audio, so it cannot tell about the parts after that.
    texts = ["Hello.", f"foreign {spoken}", f"{spoken} foreign", f"foreign {spoken} foreign"]

    def header(text: str, audio_format: str, **fields: str) -> str | None:
        response, _ = server.speak(input=text, response_format=audio_format, **fields)
        assert response.headers["X-Finish-Reason"] in {None, "stop"}
        return response.headers["X-Skipped-Parts"]

    def last_event(text: str) -> Any:
        events = server.speak(input=text, response_format="pcm", stream_format="sse")[1].decode().split("\n\n")
        return json.loads(events[-2].removeprefix("data: "))

    assert [header(text, "wav") for text in texts] == ["0", "1", "1", "2"]
    assert [header(text, "pcm") for text in texts] == [None, "1", None, "1"]
    events = [last_event(text) for text in texts]
    assert [(event["type"], event["skipped_parts"]) for event in events] == [
        ("speech.audio.done", skipped) for skipped in (0, 1, 1, 2)
    ]
    assert events[3]["usage"]["output_tokens"] == 1
    with caplog.at_level(logging.INFO):
        header(texts[3], "mp3")
        server.wait_until(lambda: any(getattr(record, "fields", {}).get("skipped") == 2 for record in caplog.records))


def test_a_part_that_cannot_be_spoken_is_left_out_and_counted(serve: Callable[..., Server]) -> None:
    pytest.importorskip("regex")
    pytest.importorskip("sentencex")
    server = serve("ready")
    response, body = server.speak(input="foreign " + "x" * 280)
    assert (response.status, body) == (200, b"x" * 280)
    assert server.metric("skipped_parts_total") == 1
    response, body = server.speak(input="foreign")
    assert (response.status, "does not know" in json.loads(body)["error"]["message"]) == (400, True)


@pytest.mark.parametrize("value", [0, 5, None])
def test_a_setting_that_the_model_does_not_have_is_refused_with_its_name(
    value: int | None, serve: Callable[..., Server]
) -> None:
    server = serve("ready")
    response, body = server.speak(top_k=value)
    if value is None:  # counts as a missing field
        assert (response.status, body) == (200, b"Hello.")
        return
    error = json.loads(body)["error"]
    assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", "top_k")
    assert "the model english has no setting 'top_k'" in error["message"]


def test_a_text_of_one_character_is_spoken_or_refused_with_its_field(serve: Callable[..., Server]) -> None:
    server = serve("ready", variants=(MULTILINGUAL,))
    for language, text in (("en", "a"), ("fr", "é"), ("zh", "好"), ("ja", "は"), ("ru", "я"), ("de", "7"), ("ar", "؟")):
        response, body = server.speak(input=text, language=language)
        assert (response.status, body.decode()) == (200, text)
    for text, language, message in ((" ", "en", "empty"), ("\u200b", "en", "empty"), ("א", "he", "nikud")):
        response, body = server.speak(input=text, language=language)
        error = json.loads(body)["error"]
        assert (response.status, error["param"]) == (400, "input")
        assert message in error["message"]


def conversion_form(source: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="c"\r\n\r\n'
    fields = b'\r\n--b\r\nContent-Disposition: form-data; name="response_format"\r\n\r\nwav\r\n--b--\r\n'
    return head + source + fields


def test_an_hour_of_speech_is_not_converted(serve: Callable[..., Server]) -> None:
    server = serve("ready", converts=True)
    rate = 8_000
    hour = sound_file(np.zeros(3600 * rate, np.int16), rate, kind="FLAC")  # it is compressed to less than 1 MB
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response, body = request(server.port, "POST", CONVERSIONS, headers, conversion_form(hour))
    error = json.loads(body)["error"]
    assert (response.status, error["param"]) == (400, None)
    assert "the speech to convert is 3600.00 s long; 0.12 to 300 s are needed" in error["message"]
    assert "cut long speech at pauses" in error["message"]
    response, body = request(server.port, "POST", CONVERSIONS, headers, conversion_form(sound_file(tone())))
    assert (response.status, body[:4], response.headers["X-Skipped-Parts"]) == (200, b"RIFF", "0")


@contextlib.contextmanager
def unread_speech(server: Server, audio_format: str) -> Iterator[socket.socket]:
    """Request megabytes of audio, and wait until the response has begun. The caller reads it."""
    body = json.dumps({"input": "loud", "response_format": audio_format})
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(f"POST {SPEECH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        yield connection


def read_to_end(connection: socket.socket) -> int:
    connection.shutdown(socket.SHUT_WR)
    size = 0
    while data := connection.recv(1 << 20):
        size += len(data)
    return size


@pytest.mark.parametrize("audio_format", ["pcm", "wav"])
def test_a_client_that_does_not_read_holds_neither_the_worker_nor_the_queue(
    audio_format: str, serve: Callable[..., Server]
) -> None:
    server = serve("ready", limit=1)
    with unread_speech(server, audio_format):
        assert server.metric("requests_in_flight") == 0
        assert server.speak()[1] == b"Hello."
        assert not asyncio.run(server.admission.drained(0)), "a drain waits for the client"
    server.wait_until(lambda: asyncio.run(server.admission.drained(0)))


def test_a_client_that_reads_late_gets_the_complete_audio(serve: Callable[..., Server]) -> None:
    server = serve("ready")
    with unread_speech(server, "pcm") as connection:
        server.wait_until(lambda: server.metric("requests_in_flight") == 0)
        assert read_to_end(connection) > 2 << 20
    assert server.metric("buffered_bytes") == 0


def test_requests_are_refused_while_too_much_audio_waits_for_clients(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_buffer, "_ALL_BYTES", 1 << 20)
    server = serve("ready")
    with unread_speech(server, "wav"):
        assert server.metric("buffered_bytes") > 1 << 20
        assert_refused(server.speak(), 429, "queue_full")
    server.wait_until(lambda: server.speak()[0].status == 200)
    assert server.metric("buffered_bytes") == 0


def test_large_bodies_share_a_limited_amount_of_memory(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "_SHARED_BYTES", 1 << 20)
    server = serve("ready")
    part = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" % SPEECH.encode() + b" " * 999_999
    large = BODY + " " * 300_000
    with connect(server.port, part) as one, connect(server.port, part) as other:
        (refused, *_), _, _ = select.select([one, other], [], [], 20)
        assert refused.recv(12) == b"HTTP/1.1 429"
        assert server.speak()[1] == b"Hello."
        assert_refused(request(server.port, "POST", SPEECH, body=large), 429, "too_many_bodies")
    server.wait_until(lambda: request(server.port, "POST", SPEECH, body=large)[1] == b"Hello.")


def test_a_path_with_a_slash_at_its_end_is_redirected_without_a_host(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    for path, location in (
        ("/v1/audio/speech/", "../speech"),
        ("/v1/audio/voices/?limit=1", "../voices?limit=1"),
        ("/v1/audio/voices/a%2Fb/", None),
        ("/nowhere/", None),
        ("//evil.example/", None),
        ("/livez//", None),
    ):
        response, _ = request(server.port, "GET", path, {"Host": "evil.example"})
        assert (response.status, response.headers["Location"]) == (307 if location else 404, location)


@contextlib.contextmanager
def nginx(directory: Path, server: Server) -> Iterator[int]:
    """Run nginx with the configuration of the documentation in front of a server; yield its port.

    Requests to `/plain/` do not pass on the `Host` header.
    """
    snippets = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    (location,) = [snippet.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}") for snippet in snippets]
    plain = re.sub(r".*proxy_set_header Host.*", "", location).replace("location /tts/", "location /plain/")
    port = free_port()
    folders = " ".join(
        f"{name}_temp_path {directory};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {directory}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {folders} server {{ listen 127.0.0.1:{port};\n{location}\n{plain}\n}} }}\n"
    )
    command = ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "nginx.conf")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(ConnectionRefusedError), connect(port):
                    break
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield port
        finally:
            process.terminate()


@pytest.mark.programs
def test_the_documented_nginx_passes_on_pages_requests_and_streams(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    pytest.importorskip("regex")
    pytest.importorskip("sentencex")
    server = serve("ready", sites=Sites(hosts=["tts.example"]))
    folder = tmp_path / "nginx"
    folder.mkdir()
    with nginx(folder, server) as port:
        own = {"Host": f"tts.example:{port}", "Origin": f"http://tts.example:{port}"}
        for prefix in ("/tts", "/plain"):
            assert request(port, "GET", f"{prefix}/", own)[0].status == 200
            assert request(port, "POST", prefix + SPEECH, own, BODY)[1] == b"Hello."
            foreign = {**own, "Origin": "http://evil.example"}
            assert_refused_page(request(port, "POST", prefix + SPEECH, foreign, BODY))
            redirect = request(port, "GET", prefix + VOICES + "/", own)[0]
            assert (redirect.status, redirect.headers["Location"]) == (307, "../voices")
        # The second part never gets an answer, so the first one must pass without the end of the response.
        body = json.dumps({"input": "x" * 280 + " unanswered", "response_format": "pcm"})
        head = f"POST /tts{SPEECH} HTTP/1.1\r\nHost: tts.example\r\nContent-Length: {len(body)}\r\n\r\n"
        with connect(port, (head + body).encode()) as stream:
            received = b""
            while b"x" * 280 not in received:
                received += stream.recv(4096)


def assert_refused_page(result: Response) -> None:
    response, body = result
    assert (response.status, json.loads(body)["error"]["code"]) == (403, "cross_site")


def test_the_speed_is_ignored_with_the_option(serve: Callable[..., Server]) -> None:
    assert serve("ready").speak(speed=1.5)[0].status == 400
    server = serve("ready", ignore_speed=True)
    assert server.speak(speed=1.5)[1] == b"Hello."
    fields = json.loads(request(server.port, "GET", "/openapi.json")[1])["components"]["schemas"]["SpeechRequest"]
    assert fields["properties"]["speed"].keys() == {"description"}


def test_a_request_that_waits_too_long_for_a_worker_is_refused(serve: Callable[..., Server]) -> None:
    server = serve("slow", wait_seconds=0.2)
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.speak)
        server.wait_until(lambda: server.pool.workers[0].busy)
        assert_refused(server.speak(), 503, "busy")
        assert first.result()[1] == b"Hello."


@pytest.mark.usefixtures("slow_voice")
def test_a_drain_waits_for_an_upload_and_refuses_new_ones(serve: Callable[..., Server]) -> None:
    server = serve("slow")
    with ThreadPoolExecutor() as clients:
        first = clients.submit(server.upload)
        server.wait_until(lambda: server.metric("requests_in_flight") == 1)
        server.admission.draining = True
        assert_refused(server.upload(), 503, "draining")
        assert asyncio.run(server.admission.drained(20))
        assert first.result()[0].status == 201


def test_a_draining_server_closes_connections_after_the_response(serve: Callable[..., Server]) -> None:
    server = serve("ready")
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    seen = []
    for draining in (False, True):
        server.admission.draining = draining
        client.request("POST", SPEECH, BODY)
        response = client.getresponse()
        response.read()
        seen.append((response.status, response.headers["Connection"], client.sock is None))
    client.close()
    assert seen == [(200, None, False), (503, "close", True)]
    probe = request(server.port, "GET", "/livez")[0]
    assert (probe.status, probe.headers["Connection"]) == (200, "close")


def test_a_worker_that_dies_during_a_drain_fails_its_requests_at_once(serve: Callable[..., Server]) -> None:
    server = serve("stuck", wait_seconds=600)
    with ThreadPoolExecutor() as clients:
        requests = [clients.submit(server.speak) for _ in range(2)]
        server.wait_until(lambda: server.metric("requests_in_flight") == 2)
        server.wait_until(lambda: server.pool.waiting == 1)
        server.admission.draining = True
        server.pool.close()
        os.kill(server.pool.workers[0].pid, signal.SIGKILL)
        for pending in requests:
            assert_refused(pending.result(60), 503, "worker_gone")


def test_startupz_shows_the_reason_of_a_failed_worker(serve: Callable[..., Server]) -> None:
    server = serve("weights")
    server.wait_until(lambda: server.pool.failure)
    response, body = request(server.port, "GET", "/startupz")
    (worker,) = TypeAdapter(Status).validate_json(body, strict=True)["workers"]
    assert (response.status, worker["phase"], worker["reason"]) == (503, "failed", "the weights are gone")


def test_the_openapi_document_is_built_once(serve: Callable[..., Server]) -> None:
    server = serve("silent")
    first, second = (request(server.port, "GET", "/openapi.json") for _ in range(2))
    arguments = (500, False, ("english",), ("en",), tuple(ENGLISH.controls))
    assert first[1] == second[1] == encoded_document(*arguments)
    assert encoded_document(*arguments) is encoded_document(*arguments)
    assert first[0].headers["Content-Type"] == "application/json"
    assert json.loads(first[1])["components"]["schemas"]["SpeechRequest"]["properties"]["input"]["maxLength"] == 500


@pytest.mark.parametrize("one_shot", [True, False])
@pytest.mark.parametrize("audio_format", ["flac", "mp3", "opus"])
def test_libsndfile_runs_outside_the_event_loop(
    audio_format: str, one_shot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoding.encoder
    threads: set[int] = set()

    class Watched:
        def __init__(self, audio_format: str, *, one_shot: bool) -> None:
            threads.add(threading.get_ident())
            self._real = real(audio_format, one_shot=one_shot)
            self.media_type = self._real.media_type

        def encode(self, pcm: bytes) -> bytes:
            threads.add(threading.get_ident())
            return self._real.encode(pcm)

        def finish(self) -> bytes:
            threads.add(threading.get_ident())
            return self._real.finish()

    monkeypatch.setattr(audio_response, "encoder", Watched)

    async def chunks() -> AsyncIterator[Chunk]:
        for _ in range(3):
            yield Chunk(pcm=bytes(48_000), tokens=25)

    async def encode_all() -> bytes:
        _, parts = await encoded(audio_format, chunks(), one_shot=one_shot)
        return b"".join([part async for part in parts])

    assert len(asyncio.run(encode_all())) > 100
    assert threads
    assert threading.get_ident() not in threads
