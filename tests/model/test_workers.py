"""Two supervised workers on one machine: they are killed, hang and run out of memory during requests."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile

from chatterbox_prewarm.serve.workers.sentence_split import split
from tests.helpers.serving import SENTENCE, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from chatterbox_prewarm.start.attach import Attached

SENTENCES = [f"This is sentence number {number}, and it is here to be spoken by itself. " * 4 for number in range(3)]
LONG = "".join(SENTENCES)
#: The server splits LONG into these. The seed of a part is the request's seed plus the number of the part.
PARTS = list(enumerate(split(LONG)))


@pytest.fixture(scope="module")
def pair(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server with two workers on the CPU, which notices within 30 s that a worker hangs."""
    directory = tmp_path_factory.mktemp("pair")
    server = Server(
        directory / "log",
        *("--warm", baked, "--weights", mini, "--cache", directory / "cache", "--policy", "require"),
        *("--device", "cpu,cpu", "--hang-seconds", "30"),
    )
    try:
        server.wait_ready(workers=2)
        yield server
    finally:
        server.end()


@pytest.fixture
def server(pair: Server) -> Server:
    """Return the server when both workers are ready."""
    pair.wait_ready(workers=2)
    return pair


def sound(wav: bytes) -> NDArray[np.int16]:
    samples: NDArray[np.int16] = soundfile.read(io.BytesIO(wav), dtype="int16")[0]
    return samples


def open_stream(server: Server, **fields: Any) -> socket.socket:
    """Send a speech request; return the connection without reading the response."""
    body = json.dumps({**SENTENCE, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_audio_over_http_equals_the_models_audio(server: Server, attached: Attached) -> None:
    status, wav = server.speak(max_new_tokens=40)
    assert status == 200
    spoken = attached.synthesizer.synthesize(SENTENCE["input"], seed=SENTENCE["seed"], max_new_tokens=40)
    # Equal except for rounding: a worker computes with half as many threads.
    difference = sound(wav).astype(float) - spoken.pcm
    assert len(wav) > 10_000
    assert np.sum(difference**2) < 1e-8 * np.sum(spoken.pcm.astype(float) ** 2)


def test_the_chunks_of_a_stream_add_up_to_the_complete_audio(server: Server) -> None:
    complete = sound(server.speak(max_new_tokens=50)[1]).astype(float)
    status, pcm = server.speak(max_new_tokens=50, response_format="pcm")
    assert status == 200
    streamed = np.frombuffer(pcm, dtype="<i2").astype(float)
    assert streamed.shape == complete.shape
    assert np.sum((streamed - complete) ** 2) < 1e-8 * np.sum(complete**2)


def test_both_workers_speak_at_the_same_time(server: Server) -> None:
    with ThreadPoolExecutor(2) as clients:
        requests = [clients.submit(server.speak, max_new_tokens=40, seed=seed) for seed in (1, 2)]
        deadline = time.monotonic() + 60
        while not all(worker["busy"] for worker in server.status()[1]["workers"]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert [request.result()[0] for request in requests] == [200, 200]


@pytest.mark.slow
def test_a_long_text_is_spoken_in_order_and_short_texts_overtake_it(server: Server) -> None:
    ended: dict[str, float] = {}

    def speak(name: str, text: str) -> bytes:
        status, wav = server.speak(input=text, max_new_tokens=15)
        ended[name] = time.monotonic()
        assert status == 200
        return wav

    with ThreadPoolExecutor(6) as clients:
        long = [clients.submit(speak, f"long {number}", LONG) for number in range(2)]
        server.wait_until_busy()
        short = clients.submit(speak, "short", "Hello.")
        assert len(sound(long[0].result())) > len(sound(short.result()))
        assert long[0].result() == long[1].result()
        parts = [
            server.speak(input=part, seed=SENTENCE["seed"] + number, max_new_tokens=15)[1] for number, part in PARTS
        ]
        joined = np.concatenate([sound(wav) for wav in parts])
        assert np.array_equal(sound(long[0].result()), joined)
    assert ended["short"] < min(ended["long 0"], ended["long 1"])


def test_a_client_that_disconnects_frees_its_worker(server: Server) -> None:
    before = server.metric("speech_abandoned_total")
    with open_stream(server, input=LONG, max_new_tokens=400, response_format="pcm"):
        server.wait_until_busy()
    deadline = time.monotonic() + 20
    while any(worker["busy"] for worker in server.status()[1]["workers"]):
        assert time.monotonic() < deadline, "the complete speech would take minutes"
        time.sleep(0.02)
    assert server.metric("speech_abandoned_total") == before + 1
    assert server.metric("requests_in_flight") == 0
    assert server.metric("queue_parts") == 0
    assert server.speak()[0] == 200


@pytest.mark.slow
def test_requests_of_a_killed_worker_are_answered(server: Server) -> None:
    expected = {seed: server.speak(seed=seed, max_new_tokens=25)[1] for seed in range(3)}
    restarts = server.metric("worker_restarts_total")
    with ThreadPoolExecutor(3) as clients:
        requests = {seed: clients.submit(server.speak, seed=seed, max_new_tokens=25) for seed in range(3)}
        server.wait_until_busy()
        os.kill(server.workers()[0], signal.SIGKILL)
        answers = {seed: request.result() for seed, request in requests.items()}
    assert {status for status, _ in answers.values()} == {200}
    assert {seed: wav for seed, (_, wav) in answers.items()} == expected
    server.wait_ready(workers=2)
    assert server.metric("worker_restarts_total") == restarts + 1
    assert server.status()[1]["misses"] == {}


@pytest.mark.slow
def test_a_stream_continues_where_its_worker_died(server: Server) -> None:
    fields = {"input": LONG, "max_new_tokens": 25, "response_format": "pcm"}
    expected = server.speak(**fields)[1]
    answers: list[bytes] = []
    client = threading.Thread(target=lambda: answers.append(server.speak(**fields)[1]))
    client.start()
    server.wait_until_busy()
    time.sleep(1)
    busy = [worker["busy"] for worker in server.status()[1]["workers"]].index(True)
    os.kill(server.workers()[busy], signal.SIGKILL)
    client.join()
    assert answers == [expected]


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced_and_its_request_answered(server: Server) -> None:
    restarts = server.metric("worker_restarts_total")
    stopped = server.workers()
    with ThreadPoolExecutor(2) as clients:
        for worker in stopped:
            os.kill(worker, signal.SIGSTOP)
        requests = [clients.submit(server.speak, seed=seed) for seed in (1, 2)]
        assert [request.result()[0] for request in requests] == [200, 200]
    server.wait_ready(workers=2)
    assert server.metric("worker_restarts_total") == restarts + 2
    assert not set(server.workers()) & set(stopped)
    server.wait_log("hangs")


@pytest.mark.slow
def test_a_worker_without_memory_is_replaced_and_its_request_answered(server: Server) -> None:
    """The limit is on the address space; a new worker does not inherit it."""
    restarts = server.metric("worker_restarts_total")
    for worker in server.workers():
        size = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(worker, resource.RLIMIT_AS, (size + 2**20, resource.RLIM_INFINITY))
    with ThreadPoolExecutor(2) as clients:
        fields = {"input": SENTENCES[0], "max_new_tokens": 200}
        requests = [clients.submit(server.speak, seed=seed, **fields) for seed in (1, 2)]
        assert [request.result()[0] for request in requests] == [200, 200]
    server.wait_ready(workers=2)
    assert server.metric("worker_restarts_total") >= restarts + 1
    assert "device failed" in server.log.read_text() or "memory" in server.log.read_text()


@pytest.mark.slow
def test_a_request_that_waits_longer_than_queue_seconds_is_refused(baked: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(
        tmp_path / "log",
        *("--warm", baked, "--weights", mini, "--cache", tmp_path / "cache", "--queue-seconds", "0.5"),
    )
    try:
        server.wait("/readyz", 200)
        busy = threading.Thread(target=server.speak, kwargs={"input": LONG, "max_new_tokens": 50})
        busy.start()
        server.wait_until_busy()
        status, body = server.speak()
        assert status == 503
        assert json.loads(body)["error"]["code"] == "busy"
        busy.join()
        assert server.speak()[0] == 200
    finally:
        assert server.end() == 0
