"""Parsing of speech requests: accepted fields, and error messages for invalid ones."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any, get_args

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES
from chatterbox_prewarm.serve.http.error_responses import RequestError, error_fields
from chatterbox_prewarm.serve.http.speech_rules import SpeechRules
from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError
from chatterbox_prewarm.system.limits import MAX_SEED, SAMPLING

pytest.importorskip("pydantic")

from chatterbox_prewarm.serve.http import speech_request
from chatterbox_prewarm.serve.http.speech_request import SpeechRequest, parse_speech_options
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL


def parse(**fields: Any) -> SpeechOptions:
    return parse_speech_options(json.dumps({"input": "Hello.", **fields}).encode())


def test_a_request_needs_only_a_text() -> None:
    assert parse_speech_options(b'{"input": "Hello."}') == SpeechOptions(
        text="Hello.", model="english", language="en", voice="default", format="mp3"
    )


def test_all_fields_become_options() -> None:
    settings = {
        "seed": 7,
        "max_new_tokens": 100,
        "temperature": 0.7,
        "cfg_weight": 0,
        "exaggeration": 1.5,
        "look_ahead": 10,
    }
    options = parse(voice="fox", response_format="opus", stream_format="sse", speed=1, model="tts-1", **settings)
    assert options == SpeechOptions(
        text="Hello.",
        model="english",
        language="en",
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


@pytest.mark.parametrize("field", ["language", "language_id"])
@pytest.mark.parametrize(("code", "known"), [("fr", "fr"), ("FR", "fr"), (None, "de")])
def test_a_request_names_its_language_or_gets_that_of_the_server(field: str, code: str | None, known: str) -> None:
    body = json.dumps({"input": "Bonjour.", field: code}).encode()
    assert parse_speech_options(body, SpeechRules(variants=(MULTILINGUAL,), language="de")).language == known


@pytest.mark.parametrize("code", ["xx", "", "zh-CN", "french", 7, True, ["fr"]])
def test_a_language_that_the_model_does_not_speak_is_refused(code: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse_speech_options(
            json.dumps({"input": "Bonjour.", "language": code}).encode(), SpeechRules(variants=(MULTILINGUAL,))
        )
    assert caught.value.param == "language"


def test_two_different_languages_are_refused() -> None:
    body = {"input": "Bonjour.", "language": "fr", "language_id": "de"}
    with pytest.raises(RequestError, match="differ"):
        parse_speech_options(json.dumps(body).encode(), SpeechRules(variants=(MULTILINGUAL,)))
    body["language"] = "DE"
    assert parse_speech_options(json.dumps(body).encode(), SpeechRules(variants=(MULTILINGUAL,))).language == "de"


def test_a_complete_text_is_checked_for_the_marks_of_its_language() -> None:
    body = json.dumps({"input": "Привет, как дела?", "language": "ru"}).encode()
    with pytest.raises(RequestError, match="stress") as caught:
        parse_speech_options(body, SpeechRules(variants=(MULTILINGUAL,)))
    assert caught.value.param == "input"
    rules = SpeechRules(plain_text=("RU",)).for_variants([MULTILINGUAL])
    assert parse_speech_options(body, rules).language == "ru"


@pytest.mark.parametrize("rules", [SpeechRules(plain_text=("hebrew",)), SpeechRules(language="xx")])
def test_rules_with_a_language_that_the_model_does_not_speak_are_refused(rules: SpeechRules) -> None:
    with pytest.raises(BadInputError, match="does not speak it"):
        rules.for_variants([MULTILINGUAL])


def test_a_model_of_one_language_refuses_the_others() -> None:
    assert parse(language="en").language == "en"
    with pytest.raises(RequestError, match="the model english does not speak it"):
        parse(language="fr")


def test_requests_of_openais_client_are_accepted() -> None:
    assert parse(model="gpt-4o-mini-tts", voice="fox", instructions="Cheerfully.", speed=1.0).voice == "fox"
    assert parse(voice={"id": "fox"}).voice == "fox"
    assert parse(voice={"id": "voices/Alice.wav"}).voice == "voices/Alice.wav", "the voice store resolves all names"


def test_a_null_field_is_treated_as_missing() -> None:
    assert parse(**dict.fromkeys(SpeechRequest.model_fields.keys() - {"input"})) == parse()


def test_unknown_fields_are_ignored_and_only_their_number_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert parse(lang_code="en", streaming_chunk_size=5) == parse()
    assert "ignored 2 unknown field(s)" in caplog.text
    assert "lang_code" not in caplog.text
    assert "Hello" not in caplog.text


@pytest.mark.parametrize("audio_format", MEDIA_TYPES)
def test_all_formats_are_accepted(audio_format: str) -> None:
    assert parse(response_format=audio_format).format == audio_format


def test_the_formats_of_the_request_match_those_of_the_encoder() -> None:
    literal, _ = get_args(SpeechRequest.model_fields["response_format"].annotation)
    assert get_args(literal) == tuple(MEDIA_TYPES)


def test_all_fields_have_a_next_step_for_their_error() -> None:
    assert speech_request.NEXT_STEPS.keys() == SpeechRequest.model_fields.keys()


def test_the_default_text_limit_is_openais() -> None:
    assert MAX_CHARACTERS == 4096
    assert parse(input="x" * 4096).text == "x" * 4096
    body = json.dumps({"input": "x" * 5000}).encode()
    assert len(parse_speech_options(body, SpeechRules(max_characters=5000)).text) == 5000
    with pytest.raises(RequestError, match="5000 characters, more than the limit of 4999") as caught:
        parse_speech_options(body, SpeechRules(max_characters=4999))
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
def test_values_at_the_bounds_are_accepted_and_values_beyond_are_refused(name: str, low: float, high: float) -> None:
    assert getattr(parse(**{name: low}), name) == low
    assert getattr(parse(**{name: high}), name) == high
    for value in (low - 1, high + 1, -(10**30), 10**300, 10**400, "1", True, [1], {"a": 1}):
        with pytest.raises(RequestError) as caught:
            parse(**{name: value})
        assert caught.value.param == name
        assert repr(name) in caught.value.message
        assert f"from {low} to {high}" in caught.value.next_step


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "'input': the text is empty"),
        ({"input": " \n\u200b"}, "input", "empty"),
        ({"input": None}, "input", "NoneType, not a string"),
        ({"input": 5}, "input", "int, not a string"),
        ({"input": ["a"]}, "input", "list, not a string"),
        ({"input": "bell \x07"}, "input", r"U\+0007"),
        ({"input": "x" * 4097}, "input", "4097 characters"),
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
        ({"speed": 1.25}, "speed", r"(?s)'speed' is 1\.25.*--ignore-speed"),
        ({"speed": "1"}, "speed", "'speed' is '1'"),
        ({"seed": 1.0}, "seed", r"'seed' is 1\.0"),
        ({"seed": "one"}, "seed", "'seed' is 'one'"),
        ({"temperature": "x" * 100_000}, "temperature", "'temperature' is 'x"),
    ],
)
def test_an_invalid_field_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
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
    with pytest.raises(RequestError, match="no field 'input'") as caught:
        parse_speech_options(body)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"not json", "not JSON"),
        (b'{"input": "cut', "not JSON"),
        (b'{"input": "a"} {}', "not JSON"),
        (b"\xef\xbb\xbf", "not JSON"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not JSON"),
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
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        parse_speech_options(body)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("speed", [1.25, 0, "fast", None])
def test_the_speed_can_be_ignored(speed: object) -> None:
    body = json.dumps({"input": "Hello.", "speed": speed}).encode()
    assert parse_speech_options(body, SpeechRules(ignore_speed=True)) == parse_speech_options(b'{"input": "Hello."}')


def test_a_byte_order_mark_before_the_json_is_accepted() -> None:
    assert parse_speech_options(b'\xef\xbb\xbf{"input": "Hello."}').text == "Hello."


def test_options_survive_the_way_to_the_worker_as_json() -> None:
    for options in (parse(), parse(voice="fox", stream_format="audio", seed=0, temperature=0.5, cfg_weight=0)):
        assert SpeechOptions(**json.loads(json.dumps(asdict(options)))) == options


def test_an_error_has_a_type_and_a_code() -> None:
    gone = WorkerGoneError("the worker ended", next_step="again")
    assert error_fields(gone) == {
        "message": "the worker ended",
        "type": "server_error",
        "code": "worker_gone",
        "param": None,
    }
    large = error_fields(RequestError("too large", next_step="less", status=413, code="too_large"))
    assert (large["type"], large["code"]) == ("invalid_request_error", "too_large")
    assert error_fields(BadInputError("no voice 'x'", next_step="another"))["param"] is None


def test_parsing_a_request_imports_no_torch_or_numpy() -> None:
    program = (
        "import sys; from chatterbox_prewarm.serve.http.speech_request import parse_speech_options\n"
        'parse_speech_options(b\'{"input": "Hello."}\')\n'
        "assert not {'numpy', 'soundfile', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


BOTH = SpeechRules(language="fr").for_variants([MULTILINGUAL, ENGLISH])


@pytest.mark.parametrize(
    ("name", "model", "language"),
    [
        *((name, "multilingual", "fr") for name in (None, "multilingual", "tts-1", "gpt-4o-mini-tts", "chatterbox")),
        ("english", "english", "en"),
    ],
)
def test_the_field_model_chooses_a_model_and_its_language(name: str | None, model: str, language: str) -> None:
    options = parse_speech_options(json.dumps({"input": "Hello.", "model": name}).encode(), BOTH)
    assert (options.model, options.language) == (model, language)


@pytest.mark.parametrize("name", ["multilingual-v3", "../english", "English", "", " english", "kokoro", "x" * 5000])
def test_a_model_that_the_server_does_not_have_is_refused_with_the_names_of_its_models(name: str) -> None:
    with pytest.raises(RequestError, match=r"this server has multilingual, english\n") as caught:
        parse_speech_options(json.dumps({"input": "Hello.", "model": name}).encode(), BOTH)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(str(caught.value)) < 300


def test_a_model_refuses_a_language_that_only_another_one_speaks() -> None:
    with pytest.raises(RequestError, match="the model english does not speak it") as caught:
        parse_speech_options(b'{"input": "Bonjour.", "model": "english", "language": "fr"}', BOTH)
    assert caught.value.param == "language"
