"""OpenAI's Python client, as it comes, speaks through this server."""

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
SETTINGS = {"seed": 3, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def client(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    place = tmp_path_factory.mktemp("openai")
    places = ("--warm", baked, "--weights", mini, "--cache", place / "cache")
    server = Server(place / "log", *places, "--voice-alias", "alloy=fox")
    try:
        server.wait("/readyz", 200)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=0) as client:
            yield client
    finally:
        server.end()


def seconds(sound: bytes) -> float:
    samples, rate = soundfile.read(io.BytesIO(sound))
    assert abs(samples).max() > 0
    return float(len(samples) / rate)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chatterbox"]


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus"])
def test_speech_comes_in_each_format(client: openai.OpenAI, name: Literal["wav", "flac", "mp3", "opus"]) -> None:
    answer = client.audio.speech.create(
        model="chatterbox",
        voice="fox",
        input=TEXT,
        response_format=name,
        extra_body=SETTINGS,
    )
    assert 1.5 < seconds(answer.content) < 2.7


def test_the_default_format_is_openais(client: openai.OpenAI) -> None:
    answer = client.audio.speech.create(model="tts-1", voice="default", input=TEXT, extra_body=SETTINGS)
    assert answer.response.headers["content-type"] == "audio/mpeg"
    assert 1.5 < seconds(answer.content) < 2.7


def test_a_stream_comes_in_chunks_that_are_the_whole(client: openai.OpenAI) -> None:
    whole = client.audio.speech.create(
        model="chatterbox", voice="default", input=TEXT, response_format="pcm", extra_body=SETTINGS
    )
    with client.audio.speech.with_streaming_response.create(
        model="chatterbox", voice="default", input=TEXT, response_format="pcm", extra_body=SETTINGS
    ) as answer:
        assert "content-length" not in answer.headers
        chunks = list(answer.iter_bytes(chunk_size=4096))
    assert len(chunks) > 1
    assert b"".join(chunks) == whole.content


def test_events_carry_the_same_sound_and_end_with_usage(client: openai.OpenAI) -> None:
    whole = client.audio.speech.create(
        model="chatterbox", voice="default", input=TEXT, response_format="pcm", extra_body=SETTINGS
    )
    with client.audio.speech.with_streaming_response.create(
        model="chatterbox",
        voice="default",
        input=TEXT,
        response_format="pcm",
        stream_format="sse",
        extra_body=SETTINGS,
    ) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line]
    sound = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert sound == whole.content
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] == len(sound) // 2 // 960


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="chatterbox", voice="nobody", input=TEXT)
    assert "choose one of: default, fox" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.speech.create(model="chatterbox", voice="default", input="")
    assert caught.value.param == "input"


def test_a_voice_of_openais_is_one_of_ours_where_the_server_says_so(client: openai.OpenAI) -> None:
    def speak(voice: str) -> bytes:
        settings = {"seed": 3, "max_new_tokens": 12}
        return client.audio.speech.create(
            model="tts-1", voice=voice, input="Hello.", response_format="pcm", extra_body=settings
        ).content

    assert speak("alloy") == speak("fox") != speak("default")
    with pytest.raises(openai.BadRequestError, match="there is no voice 'echo'"):
        speak("echo")
