"""The voices over HTTP, against a real server: its store and its decoder are real, and a stand-in speaks."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import socket
import tempfile
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx
import numpy as np
import pytest
import soundfile
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response

from chatterbox_prewarm.serve.http.admission import Admission
from chatterbox_prewarm.serve.http.decode_clip import DecodeLimits
from chatterbox_prewarm.serve.http.voice_routes import PREVIEW_TEXT, UploadLimits, VoiceRoutes
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.serve.workers.supervisor import WorkerGoneError
from tests.helpers.added_voices import VARIANT, WEIGHTS, children, sound_file, tone, voice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.requests import Request

    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder

PATH = "/v1/audio/voices"
CLIP = sound_file(tone(), kind="FLAC")


class Server:
    """A server whose worker is a stand-in: it takes as long as it is told, and says what was asked of it."""

    def __init__(self, directory: Path, limits: UploadLimits, **settings: Any) -> None:
        self.store = VoiceStore(
            directory, baked={"default": 10, "fox": 20}, variant=VARIANT, weights=WEIGHTS, **settings
        )
        self.clips: list[bytes] = []
        self.orders: list[SpeechOrder] = []
        self.seconds = 0.0
        self.gone = False
        ready = cast("Pool", SimpleNamespace(ready=True))
        admission = Admission(ready, limit=32)
        routes = VoiceRoutes(self.store, admission, prepare=self._prepare, speak=self._speak, limits=limits)
        app = Starlette(routes=routes.routes())
        self._server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listener])))
        self._thread.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()

    def add(self, name: str = "ann", clip: bytes = CLIP) -> httpx.Response:
        return self.client.post(PATH, data={"name": name}, files={"file": ("clip.flac", clip)})

    async def _prepare(self, wav: bytes) -> bytes:
        self.clips.append(wav)
        await asyncio.sleep(self.seconds)
        if self.gone:
            raise WorkerGoneError("the worker ended", next_step="try again")
        return voice(clip_sha256=hashlib.sha256(wav).hexdigest())

    async def _speak(self, order: SpeechOrder, request: Request) -> Response:
        assert request.method == "GET"
        self.orders.append(order)
        return Response(b"sound", media_type="audio/wav")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers; limits are those of uploads."""
    servers: list[Server] = []

    def start(directory: Path = tmp_path, *, max_voices: int = 1000, **limits: Any) -> Server:
        servers.append(Server(directory, UploadLimits(**limits), max_voices=max_voices))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


def refused(answer: httpx.Response, status: int, code: str, word: str) -> None:
    """The answer is an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert word in error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_a_voice_is_added_listed_shown_heard_and_deleted(server: Server) -> None:
    added = server.add()
    assert added.status_code == 201, added.text
    body = added.json()
    shown = {"id": "ann", "object": "voice", "baked": False, "bytes": len(voice()), "created": 1_700_000_000}
    assert body == {**shown, "digest": body["digest"], "usable": True, "reason": None}
    assert len(body["digest"]) == 64
    (wav,) = server.clips
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == 24_000
    assert np.abs(samples / 32768 - tone()).max() < 1e-4
    listed = server.client.get(PATH).json()
    assert listed["object"] == "list"
    assert [voice["id"] for voice in listed["data"]] == ["ann", "default", "fox"]
    assert server.client.get(f"{PATH}/ann").json() == body
    heard = server.client.get(f"{PATH}/ann/preview")
    assert (heard.content, heard.headers["content-type"]) == (b"sound", "audio/wav")
    (order,) = server.orders
    assert (order.text, order.voice, order.format, order.seed) == (PREVIEW_TEXT, "ann", "wav", 0)
    deleted = server.client.delete(f"{PATH}/ann")
    assert (deleted.status_code, deleted.json()) == (200, {"id": "ann", "object": "voice.deleted", "deleted": True})
    refused(server.client.get(f"{PATH}/ann"), 404, "voice_not_found", "no voice 'ann'")


def test_openais_field_for_the_clip_is_taken_and_its_other_fields_are_ignored(server: Server) -> None:
    fields = {"name": "ann", "consent": "cons_1", "type": "audio_sample"}
    answer = server.client.post(PATH, data=fields, files={"audio_sample": ("a.flac", CLIP, "audio/flac")})
    assert answer.status_code == 201, answer.text


def test_what_voices_there_are_decides_the_status(server: Server) -> None:
    assert server.add().status_code == 201
    refused(server.add(), 409, "voice_exists", "already")
    refused(server.add("fox"), 409, "voice_exists", "baked")
    refused(server.client.delete(f"{PATH}/fox"), 403, "voice_is_baked", "cannot be deleted")
    assert server.client.get(f"{PATH}/fox").json()["baked"]
    assert server.client.get(f"{PATH}/fox/preview").status_code == 200
    for method, path in (("GET", "/bob"), ("GET", "/bob/preview"), ("DELETE", "/bob")):
        refused(server.client.request(method, PATH + path), 404, "voice_not_found", "choose one of: ann, default, fox")
    assert len(server.clips) == 1, "nothing is computed in vain"


def test_two_uploads_of_one_name_at_once_give_one_voice(server: Server) -> None:
    server.seconds = 0.5
    answers: list[int] = []
    clients = [threading.Thread(target=lambda: answers.append(server.add().status_code)) for _ in range(3)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert sorted(answers) == [201, 409, 409]


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "a.b", "a" * 65, "%00", "%ff"])
def test_no_path_of_a_request_reaches_the_file_system(server: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.b.safetensors").write_bytes(voice())
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/preview")):
        assert server.client.request(method, f"{PATH}/{name}{path}").status_code in {400, 404, 405}
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.safetensors"]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, "no multipart form"),
        ({"content": b""}, "no multipart form"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "form"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=b"}}, "form ends"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=" + "b" * 999}}, "form"),
        ({"files": {"file": ("c", CLIP)}}, "no field 'name'"),
        ({"data": {"name": "ann"}, "files": {"other": ("c", CLIP)}}, "no file"),
        ({"data": {"name": "ann", "file": "text"}, "files": {"x": ("c", b"")}}, "no file"),
        ({"data": {"name": "ann"}, "files": {"file": ("c", b"")}}, "empty"),
        ({"data": {"name": ["ann", "bob"]}, "files": {"file": ("c", CLIP)}}, "more than one"),
        ({"data": {"name": "ann"}, "files": [("file", ("c", CLIP)), ("audio_sample", ("c", CLIP))]}, "Too many files"),
        ({"data": {str(n): "x" for n in range(99)}, "files": {"file": ("c", CLIP)}}, "Too many fields"),
        ({"data": {"name": "x" * 70_000}, "files": {"file": ("c", CLIP)}}, "exceeded maximum size"),
        ({"data": {"name": "../x"}, "files": {"file": ("c", CLIP)}}, "cannot name a voice"),
        ({"files": {"name": ("c", b"ann"), "x": (None, b"")}}, "no field 'name'"),
        ({"data": {"name": "ann"}, "files": {"file": ("c", b"hello")}}, "not audio that can be read"),
        ({"data": {"name": "ann"}, "files": {"file": ("c", sound_file(tone(0.2)))}}, "0.20 s long"),
    ],
)
def test_a_form_that_makes_no_voice_is_refused(server: Server, settings: dict[str, Any], word: str) -> None:
    refused(server.client.post(PATH, **settings), 400, "invalid_request", word)
    assert server.clips == []
    assert server.add().status_code == 201


def test_a_form_cut_short_is_refused_however_much_of_it_is_there(server: Server) -> None:
    request = server.client.build_request("POST", PATH, data={"name": "ann"}, files={"file": ("c", CLIP)})
    body = request.read()
    headers = {"content-type": request.headers["content-type"]}
    for length in (1, 60, 200, len(body) // 2, len(body) - 60, len(body) - 5):
        refused(server.client.post(PATH, content=body[:length], headers=headers), 400, "invalid_request", "form")
    assert server.client.post(PATH, content=body, headers=headers).status_code == 201


def test_an_upload_is_bounded_whether_it_says_its_length_or_not(start: Callable[..., Server]) -> None:
    server = start(decode=DecodeLimits(clip_bytes=100_000))
    refused(server.add(clip=bytes(300_000)), 413, "too_large", "larger than")
    refused(server.add(clip=bytes(120_000)), 400, "invalid_request", "more than the limit of 100000")

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="c"\r\n\r\n'
        for _ in range(1000):
            yield bytes(1000)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.WriteError):  # the server may close the connection before all was sent
        refused(server.client.post(PATH, content=endless(), headers=headers), 413, "too_large", "larger than")
    assert server.add().status_code == 201


def test_nothing_of_an_upload_goes_to_a_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    clip = sound_file(np.random.default_rng(0).normal(0, 0.1, 60 * 24_000))
    assert len(clip) > 2 << 20
    assert server.add(clip=clip).status_code == 201


def test_a_trickling_upload_ends_and_holds_no_place(start: Callable[..., Server]) -> None:
    server = start(seconds=1.0, at_once=1)
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(
            b"POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        time.sleep(0.3)
        refused(server.add(), 429, "too_many_uploads", "1 voices are being added")
        slow.settimeout(10)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert server.add().status_code == 201


def test_a_client_that_goes_away_holds_no_place(start: Callable[..., Server]) -> None:
    server = start(at_once=1)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as rude:
            rude.sendall(
                b"POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            time.sleep(0.1)
        time.sleep(0.1)
    assert server.add().status_code == 201


def test_uploads_beyond_a_few_are_told_to_wait(start: Callable[..., Server]) -> None:
    server = start(at_once=2)
    server.seconds = 1.0
    answers: list[httpx.Response] = []
    clients = [threading.Thread(target=lambda n=n: answers.append(server.add(f"v{n}"))) for n in range(5)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert sorted(answer.status_code for answer in answers) == [201, 201, 429, 429, 429]
    assert {answer.headers.get("retry-after") for answer in answers} == {None, "5"}


def test_one_clip_is_decoded_at_a_time_and_the_server_answers_meanwhile(start: Callable[..., Server]) -> None:
    server = start(at_once=4)
    clip = sound_file(tone(200), kind="FLAC")
    answers: list[int] = []
    before = children()
    clients = [
        threading.Thread(target=lambda n=n: answers.append(server.add(f"v{n}", clip).status_code)) for n in range(4)
    ]
    for client in clients:
        client.start()
    most, slowest = 0, 0.0
    while any(client.is_alive() for client in clients):
        most = max(most, len(children() - before))
        begun = time.monotonic()
        assert server.client.get(f"{PATH}/fox").status_code == 200
        slowest = max(slowest, time.monotonic() - begun)
    assert answers == [201] * 4
    assert most == 1
    assert slowest < 2.0


def test_where_no_voice_can_be_kept_none_is_computed(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(tmp_path / "nowhere")
    refused(server.add(), 503, "voices_unavailable", "--voices-dir")
    assert len(server.client.get(PATH).json()["data"]) == 2
    full = start(max_voices=0)
    refused(full.add(), 507, "voices_full", "limit")
    assert server.clips == full.clips == []


def test_a_full_disk_is_said(start: Callable[..., Server], small_disk: Path) -> None:
    server = start(small_disk)
    assert server.add().status_code == 201
    refused(server.add("bob"), 507, "voices_full", "No space left")
    assert [path.name for path in small_disk.iterdir()] == ["ann.safetensors"]


def test_a_worker_that_dies_leaves_no_voice(server: Server, tmp_path: Path) -> None:
    server.gone = True
    refused(server.add(), 503, "worker_gone", "the worker ended")
    assert list(tmp_path.iterdir()) == []
    server.gone = False
    assert server.add().status_code == 201


def test_a_voice_that_cannot_be_used_is_listed_and_not_heard(server: Server, tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_bytes(voice(weights="sha256:" + "9" * 64))
    shown = {voice["id"]: voice for voice in server.client.get(PATH).json()["data"]}["old"]
    assert not shown["usable"]
    assert "checkpoint" in shown["reason"]
    refused(server.client.get(f"{PATH}/old/preview"), 400, "voice_unusable", "checkpoint")
    assert server.orders == []
    assert server.client.delete(f"{PATH}/old").status_code == 200
