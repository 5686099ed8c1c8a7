"""The server as its users meet it: probes from the first second, speech, refusals, drain, and a worker that dies."""

from __future__ import annotations

import io
import json
import os
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
from tests.conftest import run_cli, writable_copy
from tests.helpers.serving import SENTENCE, Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def started(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[Any]]]:
    """Start a server from the warm state; yield it and the answers of its probes until it is ready."""
    directory = tmp_path_factory.mktemp("serve")
    server = Server(
        directory / "log",
        *("--warm", baked, "--weights", mini, "--cache", directory / "cache", "--policy", "require"),
        *("--max-characters", "2500"),
    )
    answers: list[Any] = []
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
            answers.append((live, startup, ready, body["phase"]))
            if ready == 200:
                break
            time.sleep(0.02)
        yield server, answers
    finally:
        server.end()


@pytest.fixture(scope="module")
def server(started: tuple[Server, list[Any]]) -> Server:
    return started[0]


def test_probes_answer_from_the_first_second_and_follow_the_worker(started: tuple[Server, list[Any]]) -> None:
    answers = started[1]
    assert {live for live, *_ in answers} == {200}
    assert answers[0][1:3] == (503, 503)
    assert answers[-1][1:3] == (200, 200)
    startup = [status for _, status, _, _ in answers]
    ready = [status for _, _, status, _ in answers]
    assert startup == sorted(startup, reverse=True)
    assert ready == sorted(ready, reverse=True)
    assert (200, 503) in {(startup, ready) for _, startup, ready, _ in answers}, "attached comes before ready"
    phases = [phase for *_, phase in answers]
    assert "import" in phases
    assert phases[-1] == "ready"


def test_a_warm_start_hits_every_family_and_misses_none(server: Server) -> None:
    _, body = server.status("/startupz")
    assert body["misses"] == {}
    assert set(body["hits"]) == {"bytecode", "conditionals"}
    assert body["cross_compiled"] is False
    assert body["voices"] == ["default", "fox"]
    assert 0 < body["marks"]["attached"] < body["marks"]["ready"]


def test_the_event_log_shows_what_ran_while_python_imported(server: Server) -> None:
    phases = {phase["name"]: phase for phase in server.status("/startupz")[1]["phases"]}
    begin = {name: phase["start"] for name, phase in phases.items()}
    assert begin["torch's libraries"] < begin["prepare"], "the worker did not wait for its configuration"
    assert begin["prepare"] < begin["read ahead"] < begin["import"] + phases["import"]["seconds"]


def test_the_http_process_does_not_load_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.worker()}/maps").read_text()


def test_a_sentence_is_returned_as_a_wav_file(server: Server) -> None:
    status, sound = server.speak(voice="fox")
    assert status == 200
    samples, rate = soundfile.read(io.BytesIO(sound), dtype="int16")
    assert rate == 24_000
    assert samples.ndim == 1
    assert len(samples) > 5_000
    assert samples.any()


def test_the_same_seed_gives_the_same_audio(server: Server) -> None:
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
        (json.dumps({**SENTENCE, "voice": "nobody"}), 404, "choose one of: default, fox"),
        (json.dumps({**SENTENCE, "voice": "../x"}), 404, "there is no voice"),
        (json.dumps({**SENTENCE, "response_format": "mp4"}), 400, "send mp3"),
        (json.dumps({**SENTENCE, "temperature": -1}), 400, "temperature"),
        (json.dumps({**SENTENCE, "seed": "one"}), 400, "'seed'"),
        (json.dumps({**SENTENCE, "seed": 2**32}), 400, "'seed'"),
        (json.dumps({"input": "\u200b\n"}), 400, "empty"),
        (json.dumps({**SENTENCE, "max_new_tokens": 0}), 400, "'max_new_tokens'"),
        ('{"input": "a", "seed": ' + "9" * 5000 + "}", 400, "not JSON"),
        ("[" * 100_000, 400, "not JSON"),
    ],
)
def test_an_invalid_request_is_refused_in_openais_format(
    server: Server, body: bytes | str, status: int, word: str
) -> None:
    answered, content = server.ask("POST", "/v1/audio/speech", body)
    assert answered == status
    error = json.loads(content)["error"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.status()[0] == 200


def test_max_characters_sets_the_limit_of_the_text(server: Server) -> None:
    document = json.loads(server.ask("GET", "/openapi.json")[1])
    assert document["components"]["schemas"]["SpeechRequest"]["properties"]["input"]["maxLength"] == 2500
    status, body = server.speak(input="a" * 2501)
    assert status == 400
    assert "more than the limit of 2500" in json.loads(body)["error"]["message"]


def test_unknown_routes_and_methods_are_refused(server: Server) -> None:
    assert server.ask("GET", "/nowhere")[0] == 404
    assert server.ask("GET", "/v1/audio/speech")[0] == 405


def test_metrics_contain_hits_phases_and_readiness(server: Server) -> None:
    status, body = server.ask("GET", "/metrics")
    lines = body.decode().splitlines()
    assert status == 200
    assert 'chatterbox_prewarm_ready{model="english"} 1.0' in lines
    assert any(
        line.startswith('chatterbox_prewarm_cache_hits_total{family="bytecode",model="english"}') for line in lines
    )
    assert any(line.startswith('chatterbox_prewarm_phase_seconds{model="english",phase="import"}') for line in lines)
    assert any(line.startswith('chatterbox_prewarm_state{key="cpu-') for line in lines)


def test_a_port_in_use_is_reported_before_the_model_is_loaded(server: Server, baked: Path, mini: Path) -> None:
    refused = run_cli("serve", "--warm", baked, "--weights", mini, "--port", str(server.port), timeout=30)
    assert refused.returncode == 16
    assert "Address already in use" in refused.stderr


def test_a_client_that_disconnects_breaks_nothing(server: Server) -> None:
    body = json.dumps(SENTENCE).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert server.speak()[0] == 200
    assert server.status()[0] == 200


def test_a_dead_worker_is_noticed_and_replaced(server: Server) -> None:
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


def test_the_log_does_not_contain_the_text_of_a_request(server: Server) -> None:
    assert server.speak()[0] == 200
    log = server.wait_log("route=/v1/audio/speech status=200")
    assert SENTENCE["input"] not in log


def test_sigterm_lets_requests_finish_and_refuses_new_ones(server: Server) -> None:
    statuses: list[int] = []
    client = threading.Thread(target=lambda: statuses.append(server.speak(max_new_tokens=150)[0]))
    client.start()
    deadline = time.monotonic() + 30
    while b"requests_in_flight 1.0" not in server.ask("GET", "/metrics")[1]:
        assert time.monotonic() < deadline
    server.process.terminate()
    server.wait("/readyz", 503)
    status, body = server.speak()
    assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
    client.join()
    assert statuses == [200]
    assert server.process.wait(timeout=30) == 0
    with pytest.raises(OSError):  # noqa: PT011 - the system refuses or resets the connection
        server.ask("GET", "/livez")


def test_sigterm_during_a_start_ends_the_server_at_once(baked: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--warm", baked, "--weights", mini, "--cache", tmp_path / "cache")
    body: dict[str, Any] = {}
    while body.get("phase") != "import":
        body = server.wait("/startupz", 503)
    worker = server.worker()
    assert server.end() == 0
    assert not Path(f"/proc/{worker}").exists()
    assert "Traceback" not in server.log.read_text()


SECRET = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {SECRET}"}
#: Status of each route, except the probes, for a client with the token. The request to add a voice has no body.
GUARDED = {
    ("GET", "/"): 200,
    ("GET", "/metrics"): 200,
    ("GET", "/openapi.json"): 200,
    ("GET", "/v1/models"): 200,
    ("GET", "/v1/models/{model}"): 404,
    ("POST", "/v1/audio/speech"): 200,
    ("POST", "/v1/audio/conversions"): 404,
    ("GET", "/v1/audio/voices"): 200,
    ("POST", "/v1/audio/voices"): 400,
    ("GET", "/v1/audio/voices/{name}"): 200,
    ("DELETE", "/v1/audio/voices/{name}"): 403,
    ("GET", "/v1/audio/voices/{name}/preview"): 200,
}


@pytest.fixture(scope="module")
def guarded(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that requires a token, logs texts and queues two requests; check that it ends without an error."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "token").write_text(SECRET)
    server = Server(
        directory / "log",
        *("--warm", baked, "--weights", mini, "--cache", directory / "cache", "--max-new-tokens", "25"),
        *("--token-file", directory / "token", "--log-text", "--queue-limit", "2"),
    )
    try:
        # A probe needs no token. Without a token, the response contains only these fields.
        assert server.wait("/readyz", 200) == {"phase": "ready", "attached": True, "ready": True}
        yield server
    finally:
        status = server.end()
    assert status == 0
    assert SECRET not in server.log.read_text()


def test_every_route_except_the_probes_requires_the_token(guarded: Server) -> None:
    described = json.loads(guarded.ask("GET", "/openapi.json", headers=BEARER)[1])["paths"]
    operations = {path: item.keys() - {"parameters"} for path, item in described.items()}
    routes = {(method.upper(), path) for path, methods in operations.items() for method in methods}
    assert (
        routes - {("GET", probe) for probe in ("/livez", "/startupz", "/readyz", "/readyz/{model}")} == GUARDED.keys()
    )
    for (method, template), status in GUARDED.items():
        path = template.format(name="fox", model="another")
        body = json.dumps({**SENTENCE, "input": "The patient is called Nemo."}) if path.endswith("speech") else None
        for headers in ({}, {"Authorization": "Bearer another"}):
            answer, content = guarded.answer(method, path, body, headers)
            assert answer.status == 401, path
            assert json.loads(content)["error"]["code"] == "invalid_api_key"
        assert guarded.ask(method, path, body, BEARER)[0] == status, path
    assert guarded.ask("GET", "/livez")[0] == 200


def test_log_text_logs_the_text_of_answered_requests_only(guarded: Server) -> None:
    text = "The patient is called Dory."
    body = json.dumps({**SENTENCE, "input": text})
    assert guarded.ask("POST", "/v1/audio/speech", body)[0] == 401
    assert text not in guarded.log.read_text()
    assert guarded.ask("POST", "/v1/audio/speech", body, BEARER)[0] == 200
    assert guarded.wait_log(text).count(text) == 1


def test_requests_beyond_the_queue_limit_are_refused(guarded: Server) -> None:
    body = json.dumps({**SENTENCE, "max_new_tokens": 25})
    with ThreadPoolExecutor(6) as clients:
        requests = [clients.submit(guarded.answer, "POST", "/v1/audio/speech", body, BEARER) for _ in range(6)]
    answers = [request.result()[0] for request in requests]
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429, 429]
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status == 429)
    assert b"chatterbox_prewarm_queue_limit 2.0" in guarded.ask("GET", "/metrics", headers=BEARER)[1]


@pytest.fixture
def damaged(baked: Path, tmp_path: Path) -> Path:
    """Copy the warm state and flip one byte of its bytecode, the family that a start replaces fastest."""
    state = writable_copy(baked, tmp_path / "warm")
    path = next(path for path in (state / "bytecode").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return state


def test_a_damaged_family_is_not_used_and_counts_as_misses(damaged: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--warm", damaged, "--weights", mini, "--cache", tmp_path / "cache")
    try:
        body = server.wait("/readyz", 200)
        assert body["misses"].keys() == {"bytecode"}
        assert any("bytecode: not read" in reason and "sha256" in reason for reason in body["reasons"])
        assert server.speak()[0] == 200
    finally:
        assert server.end() == 0


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"--warm": "damaged"}, 12, "sha256"),
        ({"--warm": "/nonexistent"}, 12, "is not a warm state"),
        ({"--weights": "/nonexistent"}, 10, "no weights directory"),
        ({"--weights": "/nonexistent", "--policy": "off"}, 10, "no weights directory"),
        ({"--cache": "/proc/cache"}, 16, "cannot be written"),
        ({"--voice": "v=/nonexistent.wav"}, 16, "does not exist"),
        ({"--voice-alias": "alloy"}, 2, "has no voice"),
        ({"--voice-alias": "=default"}, 2, "has no name"),
        ({"--voice-alias": "alloy=*"}, 16, "cannot name a voice"),
        ({"--device": "cuda"}, 15, "this machine has no GPU"),
        ({"--device": "mps"}, 2, "needs macOS"),
        ({"--device": "gpu"}, 2, "no device 'gpu'"),
        ({"--device": "meta"}, 2, "no device 'meta'"),
    ],
)
def test_a_start_that_fails_ends_with_its_exit_code(
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


def test_sigterm_ends_the_server_as_soon_as_it_handles_signals(baked: Path, mini: Path, tmp_path: Path) -> None:
    """As process 1 of a container, it would ignore every signal that it does not handle."""
    command = [sys.executable, "-m", "chatterbox_prewarm", "serve", "--port", str(free_port())]
    command += ["--warm", str(baked), "--weights", str(mini), "--cache", str(tmp_path / "cache")]
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
