"""The routes of voices on a real server with a real store and decoder. Only the worker is replaced."""

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
from starlette.applications import Starlette
from starlette.responses import Response

from chatterbox_prewarm.errors import ModelError, PrewarmError
from chatterbox_prewarm.serve.http.admission import Admission
from chatterbox_prewarm.serve.http.decode_clip import UploadLimits
from chatterbox_prewarm.serve.http.voice_routes import PREVIEW_TEXT, VoiceRoutes
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.serve.workers.audio_buffer import Backlog
from chatterbox_prewarm.serve.workers.pools import Pools
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError
from tests.helpers.added_voices import VARIANT, WEIGHTS, children, sound_file, tone, voice
from tests.helpers.http_server import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions

PATH = "/v1/audio/voices"
CLIP = sound_file(tone(), kind="FLAC")


class Server:
    """A server with a simulated worker, which records its inputs, and waits for `free` before it makes a voice."""

    def __init__(self, directory: Path, limits: UploadLimits, **settings: Any) -> None:
        self.store = VoiceStore(directory, {VARIANT: WEIGHTS}, **settings)
        self.store.baked[VARIANT] = {"default": 10, "fox": 20}
        self.clips: list[bytes] = []
        self.spoken: list[SpeechOptions] = []
        self.free = threading.Event()
        self.free.set()
        self.failure: PrewarmError | None = None
        ready = SimpleNamespace(
            model=VARIANT, ready=True, was_ready=True, converts=False, retry_after=1, backlog=Backlog()
        )
        admission = Admission(Pools([cast("Pool", ready)]), limit=32)
        self.routes = VoiceRoutes(
            self.store,
            admission,
            decoding=asyncio.Semaphore(1),
            prepare=self._prepare,
            speak=self._speak,
            limits=limits,
        )
        self._stack = contextlib.ExitStack()
        self.port = self._stack.enter_context(serving(Starlette(routes=self.routes.routes())))
        base_url = f"http://127.0.0.1:{self.port}"
        self.client = self._stack.enter_context(httpx.Client(base_url=base_url, timeout=60))

    def close(self) -> None:
        self._stack.close()

    def add(self, name: str = "ann", clip: bytes = CLIP) -> httpx.Response:
        return self.client.post(PATH, data={"name": name}, files={"file": ("clip.flac", clip)})

    async def _prepare(self, wav: bytes) -> bytes:
        self.clips.append(wav)
        while not self.free.is_set():
            await asyncio.sleep(0.01)
        if self.failure is not None:
            raise self.failure
        return voice(clip_sha256=hashlib.sha256(wav).hexdigest())

    def _speak(self, options: SpeechOptions) -> Response:
        self.spoken.append(options)
        return Response(b"sound", media_type="audio/wav")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server with the given limits on uploads."""
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


def assert_error(response: httpx.Response, status: int, code: str, word: str) -> None:
    """Check an error response in OpenAI's format."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert word in error["message"]
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")


def test_a_voice_is_added_listed_shown_previewed_and_deleted(server: Server) -> None:
    added = server.add()
    assert added.status_code == 201, added.text
    body = added.json()
    expected = {
        "id": "ann",
        "name": "ann",
        "object": "voice",
        "baked": False,
        "bytes": len(voice()),
        "created": 1_700_000_000,
    }
    assert body == {**expected, "digest": body["digest"], "models": ["english"], "usable": True, "reason": None}
    assert len(body["digest"]) == 64
    (wav,) = server.clips
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="int16")
    assert rate == 24_000
    assert np.abs(samples / 32768 - tone()).max() < 1e-4
    listed = server.client.get(PATH).json()
    assert listed["object"] == "list"
    assert [voice["id"] for voice in listed["data"]] == ["ann", "default", "fox"]
    assert listed["voices"] == [{"id": name, "name": name} for name in ("ann", "default", "fox")]
    assert server.client.get(f"{PATH}/ann").json() == body
    preview = server.client.get(f"{PATH}/ann/preview")
    assert (preview.content, preview.headers["content-type"]) == (b"sound", "audio/wav")
    (options,) = server.spoken
    assert (options.text, options.voice, options.format, options.seed) == (PREVIEW_TEXT, "ann", "wav", 0)
    deleted = server.client.delete(f"{PATH}/ann")
    assert (deleted.status_code, deleted.json()) == (200, {"id": "ann", "object": "voice.deleted", "deleted": True})
    assert_error(server.client.get(f"{PATH}/ann"), 404, "voice_not_found", "no voice 'ann'")


def test_openais_name_for_the_clip_is_accepted_and_its_other_fields_are_ignored(server: Server) -> None:
    fields = {"name": "ann", "consent": "cons_1", "type": "audio_sample"}
    response = server.client.post(PATH, data=fields, files={"audio_sample": ("a.flac", CLIP, "audio/flac")})
    assert response.status_code == 201, response.text


def test_name_conflicts_and_unknown_names_have_distinct_statuses(server: Server) -> None:
    assert server.add().status_code == 201
    assert_error(server.add(), 409, "voice_exists", "already")
    assert_error(server.add("fox"), 409, "voice_exists", "baked")
    assert_error(server.client.delete(f"{PATH}/fox"), 403, "voice_is_baked", "cannot be deleted")
    fox = {"id": "fox", "name": "fox", "object": "voice", "baked": True, "bytes": 20, "created": None, "digest": None}
    assert server.client.get(f"{PATH}/fox").json() == {**fox, "models": ["english"], "usable": True, "reason": None}
    assert server.client.get(f"{PATH}/fox/preview").status_code == 200
    for method, path in (("GET", "/bob"), ("GET", "/bob/preview"), ("DELETE", "/bob")):
        assert_error(
            server.client.request(method, PATH + path), 404, "voice_not_found", "choose one of: ann, default, fox"
        )
    assert len(server.clips) == 1, "refused requests must not reach the worker"


def test_concurrent_uploads_with_one_name_give_one_voice(server: Server) -> None:
    server.free.clear()
    statuses: list[int] = []
    clients = [threading.Thread(target=lambda: statuses.append(server.add().status_code)) for _ in range(3)]
    for client in clients:
        client.start()
    wait_until(lambda: len(server.clips) == 3)
    server.free.set()
    for client in clients:
        client.join()
    assert sorted(statuses) == [201, 409, 409]


def test_a_request_path_does_not_reach_the_file_system(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.b.safetensors").write_bytes(voice())
    for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e", "a.b", "a" * 65, "%00", "%ff"):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/preview")):
            assert server.client.request(method, f"{PATH}/{name}{path}").status_code in {400, 404, 405}, name
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.safetensors"]


#: Arguments of an upload, and a word of the error.
INVALID_FORMS: list[tuple[dict[str, Any], str]] = [
    ({"content": b"{}", "headers": {"content-type": "application/json"}}, "not a multipart form"),
    ({"content": b""}, "not a multipart form"),
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
    ({"files": {"name": ("c", b"ann"), "x": (None, b"")}}, "the field 'name' of the form is a file"),
    ({"data": {"name": "ann"}, "files": {"file": ("c", b"hello")}}, "not audio that can be read"),
    ({"data": {"name": "ann"}, "files": {"file": ("c", sound_file(tone(0.2)))}}, "0.20 s long"),
]


def test_an_invalid_form_is_refused(server: Server) -> None:
    for settings, word in INVALID_FORMS:
        assert_error(server.client.post(PATH, **settings), 400, "invalid_request", word)
    assert server.clips == []
    assert server.add().status_code == 201


def test_an_incomplete_form_is_refused(server: Server) -> None:
    request = server.client.build_request("POST", PATH, data={"name": "ann"}, files={"file": ("c", CLIP)})
    body = request.read()
    headers = {"content-type": request.headers["content-type"]}
    for length in (1, 60, 200, len(body) // 2, len(body) - 60, len(body) - 5):
        assert_error(server.client.post(PATH, content=body[:length], headers=headers), 400, "invalid_request", "form")
    assert server.client.post(PATH, content=body, headers=headers).status_code == 201


def test_a_large_upload_is_refused_with_and_without_a_content_length(start: Callable[..., Server]) -> None:
    server = start(clip_bytes=100_000)
    assert_error(server.add(clip=bytes(300_000)), 413, "too_large", "larger than")
    assert_error(server.add(clip=bytes(120_000)), 400, "invalid_request", "more than the limit of 100000")

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="c"\r\n\r\n'
        for _ in range(1000):
            yield bytes(1000)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.WriteError):  # the server may close the connection during the upload
        assert_error(server.client.post(PATH, content=endless(), headers=headers), 413, "too_large", "larger than")
    assert server.add().status_code == 201


def test_an_upload_is_not_written_to_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    clip = sound_file(np.random.default_rng(0).normal(0, 0.1, 60 * 24_000))
    assert len(clip) > 2 << 20
    assert server.add(clip=clip).status_code == 201


def test_a_slow_upload_times_out_and_frees_its_slot(start: Callable[..., Server]) -> None:
    server = start(receive_seconds=1.0, concurrent=1)
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(
            b"POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        slow.settimeout(60)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert server.add().status_code == 201


def test_a_disconnected_client_frees_its_slot(start: Callable[..., Server]) -> None:
    server = start(concurrent=1)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(
                b"POST /v1/audio/voices HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            )
            wait_until(lambda: server.routes._uploads == 1)
            assert_error(server.add(), 429, "too_many_uploads", "adding 1 voices")
        wait_until(lambda: server.routes._uploads == 0)
    assert server.add().status_code == 201


def test_too_many_concurrent_uploads_get_status_429(start: Callable[..., Server]) -> None:
    server = start(concurrent=2)
    server.free.clear()
    responses: list[httpx.Response] = []
    clients = [threading.Thread(target=lambda n=n: responses.append(server.add(f"v{n}"))) for n in range(5)]
    for client in clients:
        client.start()
    wait_until(lambda: len(responses) == 3)
    server.free.set()
    for client in clients:
        client.join()
    assert sorted(response.status_code for response in responses) == [201, 201, 429, 429, 429]
    assert {response.headers.get("retry-after") for response in responses} == {None, "5"}


def test_clips_are_decoded_one_at_a_time_while_the_server_stays_responsive(start: Callable[..., Server]) -> None:
    server = start(concurrent=4)
    clip = sound_file(tone(100), kind="FLAC")
    statuses: list[int] = []
    before = children()
    clients = [
        threading.Thread(target=lambda n=n: statuses.append(server.add(f"v{n}", clip).status_code)) for n in range(4)
    ]
    for client in clients:
        client.start()
    most_processes, answered = 0, 0
    while any(client.is_alive() for client in clients):
        decoding = children() - before
        most_processes = max(most_processes, len(decoding))
        assert server.client.get(f"{PATH}/fox").status_code == 200
        answered += bool(decoding & children())  # the process that decoded before the request still runs
    assert statuses == [201] * 4
    assert most_processes == 1
    assert answered >= 4


def test_an_upload_is_refused_early_when_the_store_is_full_or_missing(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    server = start(tmp_path / "nowhere")
    assert_error(server.add(), 503, "voices_unavailable", "--voices-dir")
    assert len(server.client.get(PATH).json()["data"]) == 2
    full = start(max_voices=0)
    assert_error(full.add(), 507, "voices_full", "limit")
    assert server.clips == full.clips == []


@pytest.mark.usefixtures("lean_installation")
def test_a_lean_installation_refuses_uploads_before_it_reads_them(server: Server) -> None:
    assert_error(server.add(), 501, "uploads_unsupported", "PACKAGES=full")
    assert server.clips == []


def test_a_full_disk_gives_status_507(start: Callable[..., Server], small_disk: Path) -> None:
    server = start(small_disk)
    assert server.add().status_code == 201
    assert_error(server.add("bob"), 507, "voices_full", "No space left")
    assert [path.name for path in small_disk.iterdir()] == ["ann.safetensors"]


def test_a_failed_worker_leaves_no_voice(server: Server, tmp_path: Path) -> None:
    server.failure = WorkerGoneError("the worker ended", next_step="try again")
    assert_error(server.add(), 503, "worker_gone", "the worker ended")
    assert list(tmp_path.iterdir()) == []
    server.failure = None
    assert server.add().status_code == 201


def test_a_failed_voice_process_is_not_the_fault_of_the_clip(server: Server, tmp_path: Path) -> None:
    server.failure = ModelError("the process was killed", next_step="provide more memory")
    assert_error(server.add(), 503, "voice_failed", "the process was killed")
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_voice_is_listed_but_not_previewed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_bytes(voice(models={VARIANT: "sha256:" + "9" * 64}))
    voices = server.client.get(PATH).json()
    assert "old" not in [voice["id"] for voice in voices["voices"]], "clients offer these voices"
    listed = {voice["id"]: voice for voice in voices["data"]}["old"]
    assert not listed["usable"]
    assert "checkpoint" in listed["reason"]
    assert_error(server.client.get(f"{PATH}/old/preview"), 400, "voice_unusable", "checkpoint")
    assert server.spoken == []
    assert server.client.delete(f"{PATH}/old").status_code == 200
