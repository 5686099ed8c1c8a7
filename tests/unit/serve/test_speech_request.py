"""The body of a request for speech: what is taken, and in which words the rest is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_args

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES
from chatterbox_prewarm.serve.http.speech_api import BadFieldError, BodyTooLargeError, error_fields
from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder
from chatterbox_prewarm.serve.workers.supervisor import WorkerGoneError
from chatterbox_prewarm.system.limits import MAX_SEED, SAMPLING

pytest.importorskip("pydantic")

from chatterbox_prewarm.serve.http import speech_request
from chatterbox_prewarm.serve.http.speech_request import SpeechRequest, parse_order


def parse(**fields: Any) -> SpeechOrder:
    return parse_order(json.dumps({"input": "Hello.", **fields}).encode())


def test_a_text_is_enough() -> None:
    assert parse_order(b'{"input": "Hello."}') == SpeechOrder(text="Hello.", voice="default", format="mp3")


def test_every_field_arrives() -> None:
    ours = {
        "seed": 7,
        "max_new_tokens": 100,
        "temperature": 0.7,
        "cfg_weight": 0,
        "exaggeration": 1.5,
        "look_ahead": 10,
    }
    order = parse(voice="fox", response_format="opus", stream_format="sse", speed=1, model="tts-1", **ours)
    assert order == SpeechOrder(
        text="Hello.",
        voice="fox",
        format="opus",
        stream_format="sse",
        seed=7,
        max_new_tokens=100,
        temperature=0.7,
        cfg_weight=0,
        exaggeration=1.5,
        look_ahead=10,
    )


def test_what_openais_client_sends_is_taken() -> None:
    assert parse(model="gpt-4o-mini-tts", voice="fox", instructions="Cheerfully.", speed=1.0).voice == "fox"
    assert parse(voice={"id": "fox"}).voice == "fox"


def test_a_null_is_a_field_left_out() -> None:
    assert parse(**dict.fromkeys(SpeechRequest.model_fields.keys() - {"input"})) == parse()


def test_an_unknown_field_is_ignored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert parse(lang_code="en", streaming_chunk_size=5) == parse()
    assert "lang_code" in caplog.text
    assert "Hello" not in caplog.text


@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_every_format_can_be_asked_for(audio_format: str) -> None:
    assert parse(response_format=audio_format).format == audio_format


def test_the_formats_are_those_that_can_be_encoded() -> None:
    literal, _ = get_args(SpeechRequest.model_fields["response_format"].annotation)
    assert get_args(literal) == tuple(MEDIA_TYPES)


def test_every_field_has_words_for_its_refusal() -> None:
    assert speech_request._STEPS.keys() == SpeechRequest.model_fields.keys()


def test_the_limit_of_the_text_is_openais_unless_it_is_set() -> None:
    assert MAX_CHARACTERS == 4096
    assert parse(input="x" * 4096).text == "x" * 4096
    body = json.dumps({"input": "x" * 5000}).encode()
    assert len(parse_order(body, limit=5000).text) == 5000
    with pytest.raises(BadFieldError, match="5000 characters, more than the limit of 4999") as caught:
        parse_order(body, limit=4999)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("seed", 0, MAX_SEED),
        ("max_new_tokens", 3, 4096),
        ("look_ahead", 3, 4096),
        *((name, *SAMPLING[name]) for name in ("temperature", "cfg_weight", "exaggeration")),
    ],
)
def test_bounds_are_taken_and_what_is_beyond_is_refused(name: str, low: float, high: float) -> None:
    assert getattr(parse(**{name: low}), name) == low
    assert getattr(parse(**{name: high}), name) == high
    for value in (low - 1, high + 1, -(10**30), 10**300, 10**400, "1", True, [1], {"a": 1}):
        with pytest.raises(BadFieldError) as caught:
            parse(**{name: value})
        assert caught.value.param == name
        assert repr(name) in caught.value.message
        assert f"from {low} to {high}" in caught.value.next_step


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": ""}, "input", "'input': the text is empty"),
        ({"input": " \n\u200b"}, "input", "empty"),
        ({"input": None}, "input", "NoneType, not a string"),
        ({"input": 5}, "input", "int, not a string"),
        ({"input": ["a"]}, "input", "list, not a string"),
        ({"input": "bell \x07"}, "input", r"U\+0007"),
        ({"input": "x" * 4097}, "input", "4097 characters"),
        ({"voice": ""}, "voice", "cannot name a voice"),
        ({"voice": "../x"}, "voice", "cannot name a voice"),
        ({"voice": {"id": "a/b"}}, "voice", "cannot name a voice"),
        ({"voice": "x" * 100_000}, "voice", "cannot name a voice"),
        ({"voice": 5}, "voice", "'voice' is 5"),
        ({"voice": {"name": "fox"}}, "voice", "'voice' is"),
        ({"voice": {"id": 5}}, "voice", "'voice' is {'id': 5}"),
        ({"voice": ["fox"]}, "voice", "'voice' is"),
        ({"model": 5}, "model", "'model' is 5"),
        ({"instructions": ["Cheerfully."]}, "instructions", "'instructions' is"),
        ({"response_format": "aac"}, "response_format", "'response_format' is 'aac'"),
        ({"response_format": "MP3"}, "response_format", "'response_format' is 'MP3'"),
        ({"response_format": 5}, "response_format", "'response_format' is 5"),
        ({"stream_format": "events"}, "stream_format", "'stream_format' is 'events'"),
        ({"speed": 1.25}, "speed", r"'speed' is 1\.25"),
        ({"speed": "1"}, "speed", "'speed' is '1'"),
        ({"seed": 1.0}, "seed", r"'seed' is 1\.0"),
        ({"seed": "one"}, "seed", "'seed' is 'one'"),
        ({"temperature": "x" * 100_000}, "temperature", "'temperature' is 'x"),
    ],
)
def test_a_field_that_is_wrong_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadFieldError, match=says) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert caught.value.next_step
    assert len(str(caught.value)) < 300
    assert error_fields(caught.value) == {
        "message": str(caught.value),
        "type": "invalid_request_error",
        "code": "invalid_request",
        "param": param,
    }


@pytest.mark.parametrize("body", [b"{}", b'{"text": "Hello."}', b'{"Input": "Hello."}'])
def test_a_body_without_a_text_is_refused(body: bytes) -> None:
    with pytest.raises(BadFieldError, match="no field 'input'") as caught:
        parse_order(body)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"not json", "not JSON"),
        (b'{"input": "cut', "not JSON"),
        (b'{"input": "a"} {}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"input": "caf\xe9"}', "not UTF-8"),
        ('{"input": "a"}'.encode("utf-16"), "not UTF-8"),
        (rb'{"input": "\ud800"}', "not JSON"),
        (b'{"input": "a", "temperature": NaN}', "not JSON"),
        (b'{"input": "a", "temperature": Infinity}', "not JSON"),
        (b'{"input": "a", "unknown": -Infinity}', "not JSON"),
        (b'{"input": "a", "temperature": 1e999}', "JSON|temperature"),
        (b'{"input": "a", "seed": ' + b"9" * 5000 + b"}", "JSON|seed"),
        (b'{"input": "a", "temperature": ' + b"9" * 5000 + b"}", "JSON|temperature"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"input": ' + b"[" * 500 + b"]" * 500 + b"}", "JSON|input"),
        (b"[1]", "not a JSON object"),
        (b'"input"', "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(BadInputError, match=says) as caught:
        parse_order(body)
    assert len(str(caught.value)) < 300


def test_an_order_goes_through_json() -> None:
    for order in (parse(), parse(voice="fox", stream_format="audio", seed=0, temperature=0.5, cfg_weight=0)):
        fields = order.to_dict()
        assert None not in fields.values()
        assert SpeechOrder.from_dict(json.loads(json.dumps(fields))) == order


def test_an_error_tells_its_kind_and_code() -> None:
    gone = WorkerGoneError("the worker ended", next_step="again")
    assert error_fields(gone) == {
        "message": "the worker ended",
        "type": "server_error",
        "code": "worker_gone",
        "param": None,
    }
    large = error_fields(BodyTooLargeError("the body is larger", next_step="less"))
    assert (large["type"], large["code"]) == ("invalid_request_error", "too_large")
    assert error_fields(BadInputError("no voice 'x'", next_step="another"))["param"] is None


def test_the_front_gets_an_order_without_torch_or_numpy() -> None:
    program = (
        "import sys; from chatterbox_prewarm.serve.http.speech_request import parse_order\n"
        'parse_order(b\'{"input": "Hello."}\')\n'
        "assert not {'numpy', 'soundfile', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
