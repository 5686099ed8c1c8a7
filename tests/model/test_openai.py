"""OpenAI's Python client works with this server without changes."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Literal

import openai
import pytest
import soundfile

from tests.helpers.serving import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = "Hello from a client that knows nothing of this server."
#: About a third of a second of speech.
SETTINGS = {"seed": 3, "max_new_tokens": 12}
#: More than one chunk of 25 tokens. Random weights draw many tokens that are not speech, and these are dropped.
LONGER = {"seed": 3, "max_new_tokens": 50}


@pytest.fixture(scope="module")
def client(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory = tmp_path_factory.mktemp("openai")
    paths = ("--warm", baked, "--weights", mini, "--cache", directory / "cache")
    server = Server(directory / "log", *paths, "--voice-alias", "alloy=fox")
    try:
        server.wait("/readyz", 200)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=0) as client:
            yield client
    finally:
        server.end()


@pytest.fixture(scope="module")
def complete(client: openai.OpenAI) -> bytes:
    """Return the samples of a speech that is not streamed."""
    return client.audio.speech.create(
        model="chatterbox", voice="default", input=TEXT, response_format="pcm", extra_body=LONGER
    ).content


def seconds(sound: bytes) -> float:
    samples, rate = soundfile.read(io.BytesIO(sound))
    assert abs(samples).max() > 0
    return float(len(samples) / rate)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["english"]


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus"])
def test_speech_is_returned_in_each_format(client: openai.OpenAI, name: Literal["wav", "flac", "mp3", "opus"]) -> None:
    answer = client.audio.speech.create(
        model="chatterbox",
        voice="fox",
        input=TEXT,
        response_format=name,
        extra_body=SETTINGS,
    )
    assert 0.2 < seconds(answer.content) < 0.7


def test_the_default_format_is_openais(client: openai.OpenAI) -> None:
    answer = client.audio.speech.create(model="tts-1", voice="default", input=TEXT, extra_body=SETTINGS)
    assert answer.response.headers["content-type"] == "audio/mpeg"
    assert 0.2 < seconds(answer.content) < 0.7


def test_the_chunks_of_a_stream_add_up_to_the_complete_audio(client: openai.OpenAI, complete: bytes) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="chatterbox", voice="default", input=TEXT, response_format="pcm", extra_body=LONGER
    ) as answer:
        assert "content-length" not in answer.headers
        chunks = list(answer.iter_bytes(chunk_size=4096))
    assert len(chunks) > 1
    assert b"".join(chunks) == complete


def test_events_contain_the_same_audio_and_end_with_the_usage(client: openai.OpenAI, complete: bytes) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="chatterbox",
        voice="default",
        input=TEXT,
        response_format="pcm",
        stream_format="sse",
        extra_body=LONGER,
    ) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert sound == complete
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] == len(sound) // 2 // 960


def test_errors_raise_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.audio.speech.create(model="chatterbox", voice="nobody", input=TEXT)
    assert "choose one of: default, fox" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="chatterbox", voice="default", input="")
    assert caught.value.param == "input"


def test_an_alias_gives_openais_voice_name_to_a_voice(client: openai.OpenAI) -> None:
    def speak(voice: str) -> bytes:
        return client.audio.speech.create(
            model="tts-1", voice=voice, input="Hello.", response_format="pcm", extra_body=SETTINGS
        ).content

    assert speak("alloy") == speak("fox") != speak("default")
    with pytest.raises(openai.NotFoundError, match="there is no voice 'echo'"):
        speak("echo")
