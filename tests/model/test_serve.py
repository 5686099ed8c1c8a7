"""The server as its users meet it: probes from the first second, speech, refusals, drain, and a worker that dies."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import soundfile
import torch

from chatterbox_prewarm.bench.server import free_port
from tests.conftest import run_cli
from tests.helpers.serving import SENTENCE, Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def started(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[Any]]]:
    """A warm server, and what its probes said on the way to ready."""
    place = tmp_path_factory.mktemp("serve")
    server = Server(
        place / "log", "--warm", baked, "--weights", mini, "--cache", place / "cache", "--policy", "require"
    )
    seen: list[Any] = []
    deadline = time.monotonic() + 180
    try:
        while time.monotonic() < deadline:
            assert server.process.poll() is None, server.log.read_text()
            try:
                live = server.ask("GET", "/livez")[0]
                startup, _ = server.status("/startupz")
                ready, body = server.status("/readyz")
            except ConnectionRefusedError:
                continue
            seen.append((live, startup, ready, body["phase"]))
            if ready == 200:
                break
            time.sleep(0.02)
        yield server, seen
    finally:
        server.end()


@pytest.fixture(scope="module")
def server(started: tuple[Server, list[Any]]) -> Server:
    return started[0]


def test_probes_answer_from_the_beginning_and_follow_the_worker(started: tuple[Server, list[Any]]) -> None:
    seen = started[1]
    assert {live for live, *_ in seen} == {200}
    assert seen[0][1:3] == (503, 503)
    assert seen[-1][1:3] == (200, 200)
    startup = [status for _, status, _, _ in seen]
    ready = [status for _, _, status, _ in seen]
    assert startup == sorted(startup, reverse=True)
    assert ready == sorted(ready, reverse=True)
    assert (200, 503) in {(startup, ready) for _, startup, ready, _ in seen}, "attached comes before ready"
    phases = [phase for *_, phase in seen]
    assert "import" in phases
    assert phases[-1] == "ready"


def test_a_warm_start_hits_every_family_and_misses_none(server: Server) -> None:
    _, body = server.status("/startupz")
    assert body["misses"] == {}
    assert set(body["hits"]) == {"bytecode", "numba", "conditionals"}
    assert body["loaded"]["signal"] > 0
    assert body["voices"] == ["default", "fox"]
    assert 0 < body["marks"]["attached"] < body["marks"]["ready"]


def test_the_front_process_has_no_torch_in_it(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.worker()}/maps").read_text()


def test_a_sentence_comes_back_as_a_wav_file(server: Server) -> None:
    status, sound = server.speak(voice="fox")
    assert status == 200
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == 24_000
    assert samples.ndim == 1
    assert len(samples) > 5_000
    assert samples.any()


def test_a_seed_repeats_over_http(server: Server) -> None:
    assert server.speak()[1] == server.speak()[1] != server.speak(seed=2)[1]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (json.dumps({"input": ""}), 400, "empty"),
        (json.dumps({"input": "a" * 100_000}), 400, "100000 characters"),
        (json.dumps({"input": "a" * 2_000_000}), 413, "larger than"),
        (json.dumps({"input": "bell \x07"}), 400, "U+0007"),
        (b'{"input": "caf\xe9"}', 400, "not UTF-8"),
        (json.dumps({"input": 5}), 400, "not a string"),
        (json.dumps({"text": "hello"}), 400, "'input'"),
        ("not json", 400, "not JSON"),
        ("[1]", 400, "'input'"),
        (json.dumps({**SENTENCE, "voice": "nobody"}), 400, "choose one of: default, fox"),
        (json.dumps({**SENTENCE, "voice": "../x"}), 400, "cannot name a voice"),
        (json.dumps({**SENTENCE, "response_format": "mp4"}), 400, "ask for mp3"),
        (json.dumps({**SENTENCE, "temperature": -1}), 400, "temperature"),
        (json.dumps({**SENTENCE, "seed": "one"}), 400, "'seed'"),
        (json.dumps({**SENTENCE, "seed": 2**32}), 400, "'seed'"),
        (json.dumps({"input": "\u200b\n"}), 400, "empty"),
        (json.dumps({**SENTENCE, "max_new_tokens": 0}), 400, "'max_new_tokens'"),
        ('{"input": "a", "seed": ' + "9" * 5000 + "}", 400, "not JSON"),
        ("[" * 100_000, 400, "not JSON"),
    ],
)
def test_what_cannot_be_spoken_is_refused_in_openais_shape(
    server: Server, body: bytes | str, status: int, word: str
) -> None:
    answered, content = server.ask("POST", "/v1/audio/speech", body)
    assert answered == status
    error = json.loads(content)["error"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.status()[0] == 200


def test_unknown_routes_and_methods_are_refused(server: Server) -> None:
    assert server.ask("GET", "/nowhere")[0] == 404
    assert server.ask("GET", "/v1/audio/speech")[0] == 405


def test_metrics_tell_hits_phases_and_readiness(server: Server) -> None:
    status, body = server.ask("GET", "/metrics")
    lines = body.decode().splitlines()
    assert status == 200
    assert "chatterbox_prewarm_ready 1.0" in lines
    assert any(line.startswith('chatterbox_prewarm_cache_hits_total{family="numba"}') for line in lines)
    assert any(line.startswith('chatterbox_prewarm_phase_seconds{phase="import"}') for line in lines)
    assert any(line.startswith('chatterbox_prewarm_state{key="cpu-') for line in lines)


def test_a_port_in_use_is_said_before_anything_is_loaded(server: Server, baked: Path, mini: Path) -> None:
    refused = run_cli("serve", "--warm", baked, "--weights", mini, "--port", str(server.port), timeout=30)
    assert refused.returncode == 16
    assert "Address already in use" in refused.stderr


def test_a_dead_worker_is_seen_and_replaced(server: Server) -> None:
    first = server.worker()
    os.kill(first, signal.SIGKILL)
    server.wait("/readyz", 503)
    assert server.ask("GET", "/livez")[0] == 200
    refused, body = server.answer("POST", "/v1/audio/speech", json.dumps(SENTENCE))
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert json.loads(body)["error"]["code"] == "not_ready"
    body_ready = server.wait("/readyz", 200)
    assert body_ready["restarts"] == 1
    assert body_ready["misses"] == {}
    assert server.worker() != first
    assert server.speak()[0] == 200


def test_sigterm_lets_requests_finish_and_refuses_new_ones(server: Server) -> None:
    answers: list[int] = []
    busy = threading.Thread(target=lambda: answers.append(server.speak(max_new_tokens=300)[0]))
    busy.start()
    deadline = time.monotonic() + 30
    while b"requests_in_flight 1.0" not in server.ask("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
    server.process.terminate()
    server.wait("/readyz", 503)
    status, body = server.speak()
    assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
    busy.join()
    assert answers == [200]
    assert server.process.wait(timeout=30) == 0
    with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as the system likes
        server.ask("GET", "/livez")


def test_sigterm_during_a_start_ends_it_at_once(baked: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--warm", baked, "--weights", mini, "--cache", tmp_path / "cache")
    body: dict[str, Any] = {}
    while body.get("phase") != "import":
        body = server.wait("/startupz", 503)
    worker = server.worker()
    assert server.end() == 0
    assert not Path(f"/proc/{worker}").exists()
    assert "Traceback" not in server.log.read_text()


def test_a_longer_text_can_be_allowed(baked: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(
        tmp_path / "log",
        *("--warm", baked, "--weights", mini, "--cache", tmp_path / "cache", "--max-characters", "2500"),
    )
    try:
        server.wait("/readyz", 200)
        text = "word " * 400 + "a" * 30
        assert len(text) > 2000
        assert server.speak(input=text)[0] == 200
        assert server.speak(input=text * 2)[0] == 400
    finally:
        assert server.end() == 0


SECRET = "correct-horse-battery-staple"
#: What each route but the probes answers to whoever shows the token. Nothing is sent to add a voice of.
GUARDED = {
    ("GET", "/"): 200,
    ("GET", "/metrics"): 200,
    ("GET", "/openapi.json"): 200,
    ("GET", "/v1/models"): 200,
    ("POST", "/v1/audio/speech"): 200,
    ("GET", "/v1/audio/voices"): 200,
    ("POST", "/v1/audio/voices"): 400,
    ("GET", "/v1/audio/voices/{name}"): 200,
    ("DELETE", "/v1/audio/voices/{name}"): 403,
    ("GET", "/v1/audio/voices/{name}/preview"): 200,
}


@pytest.mark.parametrize("more", [[], ["--log-text"]], ids=["no text", "text"])
def test_a_token_is_demanded_on_every_route_and_texts_are_logged_only_if_asked_for(
    more: list[str], baked: Path, mini: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(SECRET)
    server = Server(
        tmp_path / "log",
        *("--warm", baked, "--weights", mini, "--cache", tmp_path / "cache", "--max-new-tokens", "12"),
        *("--token-file", tmp_path / "token"),
        *more,
    )
    bearer = {"Authorization": f"Bearer {SECRET}"}
    try:
        # A probe needs no token, and tells no more than it must.
        assert server.wait("/readyz", 200) == {"phase": "ready", "attached": True, "ready": True}
        described = json.loads(server.ask("GET", "/openapi.json", headers=bearer)[1])["paths"]
        operations = {path: item.keys() - {"parameters"} for path, item in described.items()}
        routes = {(method.upper(), path) for path, methods in operations.items() for method in methods}
        assert routes - {("GET", probe) for probe in ("/livez", "/startupz", "/readyz")} == GUARDED.keys()
        for (method, template), status in GUARDED.items():
            path = template.format(name="fox")
            body = json.dumps({**SENTENCE, "input": "The patient is called Nemo."}) if path.endswith("speech") else None
            for shown in ({}, {"Authorization": "Bearer another"}):
                answer, content = server.answer(method, path, body, shown)
                assert answer.status == 401, path
                assert json.loads(content)["error"]["code"] == "invalid_api_key"
            assert server.ask(method, path, body, bearer)[0] == status, path
        assert server.ask("GET", "/livez")[0] == 200
    finally:
        assert server.end() == 0
    log = server.log.read_text()
    assert log.count("route=/v1/audio/speech status=200") == 1
    assert ("Nemo" in log) == bool(more)
    assert SECRET not in log


@pytest.fixture
def damaged(baked: Path, tmp_path: Path) -> Path:
    """A state with one byte of the Numba cache flipped."""
    copy = tmp_path / "warm"
    shutil.copytree(baked, copy)
    path = next((copy / "numba").rglob("*.nbc"))
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return copy


def test_a_damaged_family_is_left_out_said_and_counted(damaged: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--warm", damaged, "--weights", mini, "--cache", tmp_path / "cache")
    try:
        body = server.wait("/readyz", 200)
        assert body["misses"]["numba"] > 1, "the family itself, and what was compiled instead"
        assert any("numba: not read" in reason and "sha256" in reason for reason in body["reasons"])
        assert "bytecode" not in body["misses"]
        assert server.speak()[0] == 200
    finally:
        assert server.end() == 0


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"--warm": "damaged"}, 12, "sha256"),
        ({"--warm": "/nonexistent"}, 12, "no warm state"),
        ({"--weights": "/nonexistent"}, 10, "no weights directory"),
        ({"--weights": "/nonexistent", "--policy": "off"}, 10, "no weights directory"),
        ({"--cache": "/proc/cache"}, 16, "cannot be written"),
        ({"--voice": "v=/nonexistent.wav"}, 16, "does not exist"),
        ({"--voice-alias": "alloy"}, 16, "has no voice"),
        ({"--voice-alias": "../x=default"}, 16, "cannot name a voice"),
        ({"--voice-alias": "alloy=*"}, 16, "cannot name a voice"),
        ({"--device": "cuda"}, 15, "torch sees no GPU"),
        ({"--device": "gpu"}, 16, "no device 'gpu'"),
        ({"--device": "meta"}, 16, "no device 'meta'"),
    ],
)
def test_a_start_that_cannot_be_ends_with_its_exit_code(
    change: dict[str, str], code: int, word: str, damaged: Path, baked: Path, mini: Path, tmp_path: Path
) -> None:
    if change == {"--device": "cuda"} and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    options = {"--warm": str(baked), "--weights": str(mini), "--cache": str(tmp_path / "c"), "--policy": "require"}
    options |= change
    if options["--warm"] == "damaged":
        options["--warm"] = str(damaged)
    arguments = [text for option in options.items() for text in option]
    refused = run_cli("serve", "--port", str(free_port()), *arguments, timeout=120)
    assert refused.returncode == code, refused.stderr
    assert word in refused.stderr
    assert "next:" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_it_can_be_ended_from_its_first_moment_on(baked: Path, mini: Path, tmp_path: Path) -> None:
    """As the first process of a container it would not even be ended by a signal that it does not handle."""
    places = [*("--warm", str(baked), "--weights", str(mini), "--cache", str(tmp_path / "cache"))]
    command = [sys.executable, "-m", "chatterbox_prewarm", "serve", "--port", str(free_port()), *places]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        handled = 0
        while not handled >> (signal.SIGTERM - 1) & 1:
            assert process.poll() is None
            status = Path(f"/proc/{process.pid}/status").read_text()
            handled = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_burst_beyond_the_queue_and_a_client_that_goes_away_break_nothing(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    server = Server(
        tmp_path / "log",
        *("--warm", baked, "--weights", mini, "--cache", tmp_path / "cache", "--queue-limit", "2"),
    )
    try:
        server.wait("/readyz", 200)
        order = json.dumps({**SENTENCE, "max_new_tokens": 100})
        with ThreadPoolExecutor(6) as clients:
            burst = [clients.submit(server.answer, "POST", "/v1/audio/speech", order) for _ in range(6)]
        answers = [request.result()[0] for request in burst]
        assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429, 429]
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status == 429)
        assert server.metric("queue_limit") == 2
        body = json.dumps(SENTENCE).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as rude:
            rude.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert server.speak()[0] == 200
        assert server.status()[0] == 200
    finally:
        assert server.end() == 0
