"""`ChatterboxServer`: other servers embed it in a few lines, without torch in their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from chatterbox_prewarm import ChatterboxServer, warm_up_multi_gpu
from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.errors import BadInputError, IntegrityError, PrewarmError
from tests.helpers.added_voices import children

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.start.attach import Attached

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TEXT = "Hello, world."


@pytest.fixture(scope="module")
def server(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatterboxServer]:
    cache = tmp_path_factory.mktemp("embedded")
    with ChatterboxServer(
        device="cpu", enable_warmup=True, warm=str(baked), weights=mini, cache=str(cache), policy="require"
    ) as server:
        yield server


def test_it_is_warm_after_construction(server: ChatterboxServer) -> None:
    (log,) = server.metrics
    assert log["misses"] == {}
    assert log["hits"]["conditionals"] == 2
    assert log["marks"]["ready"] > 0
    assert server.voices == ["default", "fox"]
    server.check()


def test_its_audio_equals_the_models_audio(server: ChatterboxServer, attached: Attached) -> None:
    audio = server.generate(TEXT, seed=1, max_new_tokens=40)
    spoken = attached.synthesizer.synthesize(TEXT, seed=1, max_new_tokens=40)
    assert np.array_equal(audio.pcm, spoken.pcm)
    assert audio.seconds == spoken.pcm.size / 24_000
    assert audio.wav.startswith(b"RIFF")


@pytest.mark.slow
def test_a_reference_clip_gives_the_voice_that_was_baked_from_it(server: ChatterboxServer, clip: Path) -> None:
    baked = server.generate(TEXT, voice="fox", seed=1, max_new_tokens=8)
    prompted = server.generate(TEXT, audio_prompt_path=str(clip), seed=1, max_new_tokens=8)
    assert prompted.pcm.size == baked.pcm.size
    again = b"".join(
        chunk.data for chunk in server.generate_stream(TEXT, audio_prompt_path=clip, seed=1, max_new_tokens=8)
    )
    assert again == prompted.data
    assert len(list(server._prompts.directory.iterdir())) == 1
    assert server._prompts.directory.stat().st_mode & 0o077 == 0, "nobody else can read the voice of a person"
    for path, problem in (("nowhere.wav", "cannot be read: No such file"), (__file__, "is not audio"), (3.5, "is 3.5")):
        with pytest.raises(BadInputError, match=problem):
            server.generate(TEXT, audio_prompt_path=path)  # type: ignore[arg-type]


def test_it_streams_and_closing_a_stream_frees_the_worker(server: ChatterboxServer) -> None:
    complete = server.generate(TEXT, seed=1, max_new_tokens=50)
    chunks = list(server.generate_stream(TEXT, seed=1, max_new_tokens=50))
    assert len(chunks) > 1
    joined = np.concatenate([chunk.pcm for chunk in chunks]).astype(float)
    assert np.sum((joined - complete.pcm) ** 2) < 1e-8 * np.sum(joined**2)
    # The server speaks a long text in parts of some sentences.
    stream = server.generate_stream(
        "This sentence is one of many, and they take long. " * 60, seed=1, max_new_tokens=60
    )
    next(stream)
    stream.close()
    began = time.monotonic()
    server.generate(TEXT, seed=1, max_new_tokens=12)
    assert time.monotonic() - began < 20, "the rest of the stream would take longer"


def test_each_thread_gets_the_answer_to_its_own_call(server: ChatterboxServer) -> None:
    expected = [server.generate(TEXT, seed=seed, max_new_tokens=20).data for seed in range(2)]
    answers: dict[int, bytes] = {}

    def speak(seed: int) -> None:
        answers[seed] = server.generate(TEXT, seed=seed, max_new_tokens=20).data

    threads = [threading.Thread(target=speak, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[seed] for seed in range(2)] == expected
    assert len(set(expected)) == 2


def test_a_dead_worker_is_replaced(server: ChatterboxServer) -> None:
    expected = server.generate(TEXT, seed=1, max_new_tokens=12).data
    (worker,) = [pid for pid in children() if _is_worker(pid)]
    os.kill(worker, signal.SIGKILL)
    assert server.generate(TEXT, seed=1, max_new_tokens=12).data == expected
    assert server.metrics[0]["restarts"] == 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"text": ""}, "empty"),
        ({"text": 5}, "not a string"),
        ({"text": "a", "voice": "nobody"}, "choose one of"),
        ({"text": "a", "voice": "../x"}, "cannot name a voice"),
        ({"text": "a", "temperature": 99.0}, "temperature"),
        ({"text": "a", "seed": -1}, "seed"),
    ],
)
def test_an_invalid_call_is_refused(server: ChatterboxServer, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInputError, match=word):
        server.generate(**settings)
    server.check()


def test_a_start_that_fails_raises_its_error(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is not a warm state"):
        ChatterboxServer(warm=tmp_path / "none", weights=mini, cache=tmp_path / "cache", policy="require")


def test_warming_up_several_gpus_without_a_gpu_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for devices in ((), (["cuda:0", "cuda:1"],)):
        with pytest.raises(PrewarmError, match="no GPU"):
            warm_up_multi_gpu(*devices)


@pytest.mark.slow
def test_several_devices_are_warmed_up_in_parallel(baked: Path, mini: Path, tmp_path: Path) -> None:
    with warm_up_multi_gpu(["cpu", "cpu"], warm=baked, weights=mini, cache=tmp_path / "cache") as server:
        logs = server.metrics
        assert [log["misses"] for log in logs] == [{}, {}]
        imports = [next(phase for phase in log["phases"] if phase["name"] == "import") for log in logs]
        assert abs(imports[0]["start"] - imports[1]["start"]) < 2, "both start at the same time"
        assert server.generate(TEXT, seed=1, max_new_tokens=12).data


def test_the_fastapi_example_serves_without_torch_in_its_process(baked: Path, mini: Path, tmp_path: Path) -> None:
    """Run the example as its readers do, with the paths of this test."""
    text = (EXAMPLES / "fastapi_app.py").read_text()
    arguments = '(warm=places / "warm", weights=places / "weights")'
    assert text.count(arguments) == 1
    paths = {"warm": baked, "weights": mini, "cache": tmp_path / "cache"}
    replaced = "(" + "".join(f"{name}=Path({str(path)!r}), " for name, path in paths.items()) + "max_new_tokens=25)"
    (tmp_path / "fastapi_app.py").write_text(text.replace(arguments, replaced))
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--port", str(port), "--app-dir", str(tmp_path)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            try:
                client.get("/openapi.json")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        assert client.get("/say", params={"text": "Hello."}).content.startswith(b"RIFF")
        assert client.get("/say", params={"text": ""}).status_code == 400
        assert len(client.get("/stream", params={"text": "Hello."}).content) > 5000
        assert client.get("/stream", params={"text": ""}).status_code == 400
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
        client.close()
    finally:
        process.terminate()
        assert process.wait(30) in {0, -signal.SIGTERM}


def _is_worker(pid: int) -> bool:
    try:
        return "serve.worker" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):  # a child of another test has ended
        return False
