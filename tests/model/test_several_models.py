"""A server with three models: each request chooses one, and a model that dies does not stop the others."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import soundfile

from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL, TURBO
from tests.conftest import run_cli
from tests.helpers.documented_requests import documented_requests, send
from tests.helpers.serving import SENTENCE, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chatterbox_prewarm.start.attach import Attached
    from chatterbox_prewarm.weights.variants import Variant

pytestmark = pytest.mark.slow

MODELS = ("multilingual", "english", "turbo")


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Callable[[Variant], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the checkpoints of three models."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in (ENGLISH, MULTILINGUAL, TURBO):
        (directory / variant.name).symlink_to(checkpoint(variant))
    return directory


@pytest.fixture(scope="module")
def server(checkpoints: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server with three models. Only English has a warm state, and Multilingual is the first model."""
    directory = tmp_path_factory.mktemp("several")
    shutil.copytree(baked, directory / "warm" / "english")
    (directory / "voices").mkdir()
    running = Server(
        directory / "log",
        *("--weights", checkpoints, "--warm", directory / "warm", "--cache", directory / "cache"),
        *(argument for model in MODELS for argument in ("--variant", model)),
        *("--voices-dir", directory / "voices", "--max-new-tokens", "50"),
    )
    try:
        running.wait_ready(workers=3)
        yield running
    finally:
        assert running.end() == 0


def test_a_request_chooses_a_model_and_the_first_one_is_the_default(server: Server, attached: Attached) -> None:
    spoken = attached.synthesizer.synthesize(SENTENCE["input"], seed=SENTENCE["seed"], max_new_tokens=12)
    status, wav = server.speak(model="english")
    assert status == 200
    # Equal except for rounding: a worker computes with half as many threads.
    assert np.abs(soundfile.read(io.BytesIO(wav), dtype="int16")[0].astype(float) - spoken.pcm).max() < 30
    first, chosen = server.speak(), server.speak(model="multilingual")
    assert first == chosen
    assert first != (status, wav)
    assert server.speak(model="multilingual", input="Bonjour.", language="fr")[0] == 200
    assert server.speak(model="turbo", input="Hello. [laugh]", top_k=20)[0] == 200
    refused, body = server.speak(model="english", input="Bonjour.", language="fr")
    assert (refused, json.loads(body)["error"]["param"]) == (400, "language")


def test_models_readiness_and_metrics_are_listed_by_model(server: Server) -> None:
    listed = json.loads(server.ask("GET", "/v1/models")[1])["data"]
    assert [model["id"] for model in listed] == [*MODELS]
    assert len(listed[0]["languages"]) == 23
    status, body = server.status("/readyz/english")
    assert (status, body["model"], body["models"]) == (200, "english", {"english": True})
    assert [worker["model"] for worker in body["workers"]] == ["english"]
    assert body["misses"] == {}, "it has a warm state"
    assert server.status("/readyz")[1]["models"] == dict.fromkeys(MODELS, True)
    assert server.ask("GET", "/readyz/multilingual-v3")[0] == 404
    metrics = server.ask("GET", "/metrics")[1].decode()
    for model in MODELS:
        (line,) = [line for line in metrics.splitlines() if line.startswith(_worker("rss_bytes", model))]
        assert float(line.rpartition(" ")[2]) > 500 << 20
    assert 'cache_misses_total{family="all",model="multilingual"} 1.0' in metrics, "it has no warm state"
    assert 'family="all",model="english"' not in metrics


def _worker(name: str, model: str) -> str:
    number = MODELS.index(model)
    return f'chatterbox_prewarm_worker_{name}{{device="cpu",model="{model}",worker="{number}"}}'


def test_an_added_voice_speaks_with_every_model(server: Server, tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, reference_audio(5.5), CLIP_SAMPLE_RATE)  # Turbo needs more than 5 s
    address = f"http://127.0.0.1:{server.port}/v1/audio/voices"
    added = httpx.post(address, data={"name": "bea"}, files={"file": clip.read_bytes()}, timeout=240)
    assert (added.status_code, added.json()["models"]) == (201, [*MODELS])
    for model in MODELS:
        assert server.speak(model=model, voice="bea") != server.speak(model=model)
        assert server.speak(model=model, voice="bea")[0] == 200
    assert server.speak(model="english", voice="fox")[0] == 200
    status, answer = server.speak(model="multilingual", voice="fox")
    assert status == 400
    assert "baked for the model english" in json.loads(answer)["error"]["message"]
    assert server.ask("GET", "/v1/audio/voices/fox/preview")[0] == 200


@pytest.mark.programs
def test_the_requests_of_the_documentation_are_answered(server: Server, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "ann.flac", reference_audio(5.5), CLIP_SAMPLE_RATE)
    spoken = documented_requests("/v1/audio/speech")
    assert len(spoken) >= 4
    for number, request in enumerate(spoken):
        directory = tmp_path / str(number)
        directory.mkdir()
        send(request, server.port, directory)
        (file,) = directory.iterdir()
        assert soundfile.info(file).frames > 0
    (ready,) = documented_requests("/readyz")
    assert json.loads(send(ready, server.port, tmp_path))["ready"]
    (voice,) = documented_requests("/v1/audio/voices")
    assert json.loads(send(voice, server.port, tmp_path))["name"] == "ann"
    assert server.ask("DELETE", "/v1/audio/voices/ann")[0] == 200


def test_a_killed_model_does_not_stop_the_others(server: Server) -> None:
    english = _pid_of(server, "english")
    os.kill(english, signal.SIGKILL)
    server.wait("/readyz/english", 503)
    status, answer = server.speak(model="english")  # at once: a new worker needs some seconds
    assert (status, json.loads(answer)["error"]["code"]) == (503, "not_ready")
    assert "the model english is not ready" in json.loads(answer)["error"]["message"]
    assert server.status("/readyz")[0] == 200, "the server can speak with the other models"
    for model in ("multilingual", "turbo"):
        assert server.speak(model=model)[0] == 200
    server.wait("/readyz/english", 200)
    assert server.speak(model="english")[0] == 200
    assert server.status("/readyz/english")[1]["restarts"] == 1
    for model in ("multilingual", "turbo"):
        assert server.status(f"/readyz/{model}")[1]["restarts"] == 0


def _pid_of(server: Server, model: str) -> int:
    """Return the process id of the worker of a model: the one that has mapped a file of its checkpoint."""
    (pid,) = [pid for pid in server.workers() if _maps(pid, "t3_cfg" if model == "english" else "t3_mtl")]
    return pid


def _maps(pid: int, name: str) -> bool:
    return name in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--variant", "english", "--variant", "english"], 2, "english is named twice"),
        (["--variant", "../english"], 2, "there is no model variant '../english'"),
        (
            ["--variant", "multilingual-v3"],
            10,
            "no checkpoint of the variant multilingual-v3, only of: english, multilingual, turbo",
        ),
        (["--language", "xx"], 2, "no model speaks the language 'xx'"),
        (["--plain-text", "fr"], 2, "'fr' is not one of 'he', 'ru'"),
        (["--variant", "english", "--language", "fr"], 16, "the language is 'fr'; the model english does not speak it"),
    ],
)
def test_a_server_that_cannot_have_its_models_does_not_start(
    checkpoints: Path, tmp_path: Path, arguments: list[Any], code: int, message: str
) -> None:
    places = ("--weights", checkpoints, "--warm", tmp_path / "warm", "--cache", tmp_path / "cache")
    refused = run_cli("serve", *places, *arguments)
    assert refused.returncode == code, refused.stderr
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def test_one_checkpoint_is_needed_where_a_command_has_one_model(checkpoints: Path) -> None:
    refused = run_cli("weights", "verify", checkpoints)
    assert refused.returncode == 10
    assert "has 3 checkpoints: english, multilingual, turbo" in refused.stderr
    assert f"such as {checkpoints / 'english'}" in refused.stderr
