"""A server that converts speech: requests, streams, voices, refused sources, memory, and a worker that dies."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import soundfile

from chatterbox_prewarm.model.reference_clip import reference_audio
from tests.conftest import run_cli
from tests.helpers.documented_requests import documented_requests, send
from tests.helpers.serving import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

RATE = 24_000
#: How far the samples of two processes with another number of threads may differ. It is due to rounding.
_ROUNDING = 30


def wav(seconds: float, rate: int = RATE, **options: Any) -> bytes:
    """Return generated speech as a sound file."""
    file = io.BytesIO()
    soundfile.write(file, reference_audio(seconds, rate), rate, format="WAV", subtype="PCM_16", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def server(mini: Path, baked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("conversions")
    (directory / "voices").mkdir()
    running = Server(
        directory / "log",
        *("--weights", mini, "--warm", baked, "--cache", directory / "cache", "--voices-dir", directory / "voices"),
        *("--convert", "--voice-alias", "narrator=fox"),
    )
    try:
        running.wait_ready(workers=2)
        yield running
    finally:
        assert running.end() == 0


def convert(server: Server, source: bytes | None = None, /, **fields: str) -> httpx.Response:
    address = f"http://127.0.0.1:{server.port}/v1/audio/conversions"
    data = {"response_format": "wav", "seed": "1", **fields}
    files = {"file": wav(1.0) if source is None else source}
    return httpx.post(address, data=data, files=files, timeout=240)


def samples_of(response: httpx.Response) -> np.ndarray[Any, np.dtype[np.int16]]:
    assert response.status_code == 200, response.text
    samples, rate = soundfile.read(io.BytesIO(response.content), dtype="int16")
    assert rate == RATE
    found: np.ndarray[Any, np.dtype[np.int16]] = samples
    return found


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    fields: dict[str, Any] = response.json()["error"]
    return fields


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
def test_the_speech_has_the_length_of_the_source(server: Server, rate: int) -> None:
    samples = samples_of(convert(server, wav(2.0, rate)))
    assert samples.size == 2 * RATE
    assert np.abs(samples).max() > 100


@pytest.mark.programs
def test_the_conversion_of_the_documentation_is_answered(server: Server, tmp_path: Path) -> None:
    (tmp_path / "speech.wav").write_bytes(wav(1.0))
    (request,) = documented_requests("/v1/audio/conversions")
    send(request, server.port, tmp_path)
    assert soundfile.info(tmp_path / "converted.wav").frames == RATE


def test_a_conversion_equals_that_of_the_converter_in_python(server: Server, mini: Path, baked: Path) -> None:
    from chatterbox_prewarm.families.conditionals import load_voice
    from chatterbox_prewarm.model.conversion import load_converter
    from chatterbox_prewarm.model.model import load

    model = load(mini, converts=True)
    assert not any(name.startswith("t3.") for name in model.tensors)
    samples, rate = soundfile.read(io.BytesIO(wav(1.0)), dtype="float32")
    voice = load_voice(baked / "conditionals" / "fox.safetensors")
    ours = load_converter(model, mini).convert(samples, rate, voice, seed=1).pcm
    for name in ("fox", "narrator"):
        served = samples_of(convert(server, voice=name))
        assert np.abs(served.astype(int) - ours).max() < _ROUNDING
    assert np.abs(samples_of(convert(server)).astype(int) - ours).max() > _ROUNDING, "another voice"


def test_a_stream_is_the_same_audio_and_a_seed_repeats_it(server: Server) -> None:
    whole, streamed, again = (convert(server, response_format=name) for name in ("wav", "pcm", "pcm"))
    pcm = np.frombuffer(streamed.content, "<i2").astype(int)
    assert streamed.headers["x-accel-buffering"] == "no"
    assert np.abs(samples_of(whole) - pcm).max() < _ROUNDING
    assert again.content == streamed.content
    early = convert(server, response_format="pcm", look_ahead="10")
    assert len(early.content) == len(streamed.content)
    assert early.content != streamed.content
    events = [json.loads(line[6:]) for line in convert(server, stream_format="sse").text.splitlines() if line]
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"] == {"input_tokens": 0, "output_tokens": 25, "total_tokens": 25}
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}


def test_an_added_voice_converts_speech(server: Server, clip: Path) -> None:
    address = f"http://127.0.0.1:{server.port}/v1/audio/voices"
    added = httpx.post(address, data={"name": "ann"}, files={"file": clip.read_bytes()}, timeout=240)
    assert added.status_code == 201, added.text
    assert not np.array_equal(samples_of(convert(server, voice="ann")), samples_of(convert(server)))


def test_models_readiness_and_metrics_know_the_conversion(server: Server) -> None:
    listed = json.loads(server.ask("GET", "/v1/models")[1])["data"]
    assert [(model["id"], model["task"]) for model in listed] == [("english", "speech"), ("vc", "conversion")]
    assert json.loads(server.ask("GET", "/v1/models/vc")[1]) == listed[1]
    status, body = server.status("/readyz/vc")
    assert (status, body["models"], body["misses"]) == (200, {"vc": True}, {})
    assert convert(server).status_code == 200
    metrics = server.ask("GET", "/metrics")[1].decode()
    assert 'chatterbox_prewarm_ready{model="vc"} 1.0' in metrics
    assert 'chatterbox_prewarm_speech_answers_total{model="vc",status="200"}' in metrics
    assert "source_seconds=1.0" in server.wait_log("source_seconds")


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"model": "english"}, 400, "model", "the model english speaks texts; vc converts speech"),
        ({"model": "tts-1"}, 400, "model", "the model english speaks texts"),
        ({"model": "turbo"}, 404, "model", "there is no model 'turbo'"),
        ({"voice": "nobody"}, 404, "voice", "no voice 'nobody'"),
        ({"seed": "-1"}, 400, "seed", "'seed' is '-1'"),
        ({"look_ahead": "1"}, 400, "look_ahead", "'look_ahead' is '1'"),
        ({"response_format": "aac"}, 400, "response_format", "send mp3, opus, flac, wav or pcm"),
    ],
)
def test_a_field_that_cannot_be_used_is_refused(
    server: Server, fields: dict[str, str], status: int, param: str, message: str
) -> None:
    refused = error(convert(server, **fields), status)
    assert refused["param"] == param
    assert message in refused["message"]


def _silent() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(RATE, np.float32), RATE, format="WAV")
    return file.getvalue()


def _not_finite() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(RATE, np.nan, np.float32), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _minutes_of_opus() -> bytes:
    """Return six minutes of speech in half a megabyte."""
    file = io.BytesIO()
    soundfile.write(file, np.tile(reference_audio(1.0, 8_000), 360), 8_000, format="OGG", subtype="OPUS")
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "the clip is empty"),
        (lambda: wav(1.0)[:44], "is 0.00 s long; 0.12 to 300 s are needed"),
        (_silent, "the speech to convert is silent"),
        (_not_finite, "contains NaN or infinity"),
        (lambda: wav(0.02), "is 0.02 s long; 0.12 to 300 s are needed"),
        (lambda: wav(301.0, 8_000), "is 301.00 s long; 0.12 to 300 s are needed"),
        (_minutes_of_opus, "300 s are needed"),
        (lambda: b"\0\0\0\x20ftypisom" + bytes(1000), "is not audio that can be read"),
        (lambda: bytes(21 << 20), "the upload is larger than"),
    ],
    ids=["empty", "header", "silent", "nan", "20 ms", "301 s", "Opus", "MP4", "21 MiB"],
)
def test_a_source_that_cannot_be_used_is_refused(server: Server, make: Any, message: str) -> None:
    response = convert(server, make())
    assert message in error(response, 413 if "larger" in message else 400)["message"]
    assert convert(server).status_code == 200


def test_a_header_that_promises_ten_hours_is_not_believed(server: Server) -> None:
    data, size = bytearray(wav(1.0)), 2 * RATE * 36_000
    data[4:8], data[40:44] = (size + 36).to_bytes(4, "little"), size.to_bytes(4, "little")
    assert samples_of(convert(server, bytes(data))).size == RATE


def test_a_text_cannot_be_sent_to_the_model_that_converts(server: Server) -> None:
    status, body = server.speak(model="vc")
    assert status == 400
    assert "the model vc converts speech, and speaks no texts" in json.loads(body)["error"]["message"]


def test_the_worker_that_converts_has_not_mapped_t3_and_its_death_does_not_stop_texts(server: Server) -> None:
    (pid,) = [pid for pid in server.workers() if "t3_cfg" not in Path(f"/proc/{pid}/maps").read_text()]
    assert "s3gen" in Path(f"/proc/{pid}/maps").read_text()
    os.kill(pid, signal.SIGKILL)
    server.wait("/readyz/vc", 503)
    assert error(convert(server), 503)["code"] == "not_ready"
    assert server.speak()[0] == 200
    server.wait("/readyz/vc", 200)
    assert convert(server).status_code == 200


def test_the_state_of_the_model_that_speaks_warms_the_conversion_up(
    mini: Path, baked_aot: Path, tmp_path: Path
) -> None:
    server = Server(
        tmp_path / "log",
        *("--weights", mini, "--warm", baked_aot, "--cache", tmp_path / "cache", "--convert", "--policy", "require"),
    )
    try:
        server.wait_ready(workers=2)
        assert samples_of(convert(server)).size == RATE
        english, converting = (server.status(f"/readyz/{model}")[1] for model in ("english", "vc"))
        assert (english["misses"], converting["misses"]) == ({}, {})
        assert converting["state"] == english["state"]
        assert 0 < converting["hits"]["aot"] < english["hits"]["aot"], "it needs no package of T3"
        rss = {worker["model"]: worker["rss_bytes"] for worker in server.status()[1]["workers"]}
        assert rss["vc"] < rss["english"]
    finally:
        assert server.end() == 0


def test_a_server_without_the_option_says_how_to_convert(mini: Path, baked: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log", *("--weights", mini, "--warm", baked, "--cache", tmp_path / "cache"))
    try:
        server.wait_ready()
        assert "start it with --convert" in error(convert(server), 404)["message"]
    finally:
        assert server.end() == 0


def test_a_server_whose_memory_does_not_suffice_for_both_does_not_start(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatterbox_prewarm.errors import BadInputError
    from chatterbox_prewarm.serve.workers import memory
    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig, for_devices
    from chatterbox_prewarm.start.options import StartOptions

    worker = WorkerConfig(start=StartOptions(warm=tmp_path, weights=mini, cache=tmp_path))
    alone, both = (for_devices(["cpu"], worker, convert=convert) for convert in (False, True))
    needed = {}
    for name, configs in (("alone", alone), ("both", both)):
        monkeypatch.setattr(memory, "usable_memory", lambda: 0)
        with pytest.raises(BadInputError, match="need"):
            memory.check_memory(configs)
        needed[name] = sum(memory._tensor_sizes(configs[-1]).values())
    assert needed["both"] < needed["alone"], "T3 is larger than the speech tokenizer"
    with pytest.raises(BadInputError, match="the models english, vc need"):
        memory.check_memory(both)


def test_the_help_names_the_option() -> None:
    assert "--convert" in run_cli("serve", "--help").stdout


def test_a_start_that_converts_is_proven(mini: Path, baked: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence.json"
    proven = run_cli("prove", "--convert", "--warm", baked, "--weights", mini, "--evidence", evidence)
    assert proven.returncode == 0, proven.stdout + proven.stderr
    assert "ok   the audio is like that of eager mode" in proven.stdout
    observed = json.loads(evidence.read_text())["observed"]
    assert observed["metrics"]["misses"] == {}
    assert observed["audio"]["samples"] == RATE
    assert observed["audio"]["decibels"] == 300, "the state has the profile eager"
