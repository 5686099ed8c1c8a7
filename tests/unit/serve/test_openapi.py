"""The API's description: valid, complete, and one with the code that checks requests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, get_args

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES

pytest.importorskip("pydantic")

from chatterbox_prewarm.serve.http import events, speech_api
from chatterbox_prewarm.serve.http import schemas as answers
from chatterbox_prewarm.serve.http.openapi import document
from chatterbox_prewarm.serve.http.speech_request import SpeechRequest, parse_order

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTES = {
    "/": {"get"},
    "/livez": {"get"},
    "/startupz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
    "/openapi.json": {"get"},
    "/v1/models": {"get"},
    "/v1/audio/speech": {"post"},
    "/v1/audio/voices": {"get", "post"},
    "/v1/audio/voices/{name}": {"get", "delete"},
    "/v1/audio/voices/{name}/preview": {"get"},
}
PROBES = {"/livez", "/startupz", "/readyz"}


@pytest.fixture(scope="module")
def described() -> dict[str, Any]:
    return document("1.2.3")


def operations(described: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in described["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield path, method, item[method]


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        for child in value.values():
            yield from refs(child)
    elif isinstance(value, list):
        for child in value:
            yield from refs(child)


def test_it_is_valid(described: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.OpenAPIV31SpecValidator(described).validate()


def test_it_is_json(described: dict[str, Any]) -> None:
    assert json.loads(json.dumps(described, allow_nan=False)) == described
    assert described["openapi"].startswith("3.1")
    assert described["info"]["version"] == "1.2.3"


def test_it_has_every_route(described: dict[str, Any]) -> None:
    assert {path: set(item) - {"parameters"} for path, item in described["paths"].items()} == ROUTES


def test_every_reference_leads_somewhere_and_nothing_is_left_over(described: dict[str, Any]) -> None:
    used = set(refs(described))
    for ref in used:
        value: Any = described
        for key in ref.removeprefix("#/").split("/"):
            value = value[key]
    there = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "parameters")
        for name in described["components"][kind]
    }
    assert there == used


def test_every_operation_is_complete(described: dict[str, Any]) -> None:
    names = [operation["operationId"] for *_, operation in operations(described)]
    assert len(names) == len(set(names))
    for path, method, operation in operations(described):
        assert operation["summary"]
        assert any(status.startswith("2") for status in operation["responses"])
        assert all(re.fullmatch("[2-5][0-9]{2}", status) for status in operation["responses"])
        assert ("401" in operation["responses"]) == (path not in PROBES)
        assert operation.get("security") == ([] if path in PROBES else None)
        assert ("requestBody" in operation) == (method == "post")
        if "requestBody" in operation:
            assert {"400", "408", "413", "429", "503"} <= operation["responses"].keys()
        parameters = described["paths"][path].get("parameters", [])
        assert [parameter["$ref"] for parameter in parameters] == (
            ["#/components/parameters/voice"] if "{name}" in path else []
        )


def test_a_token_is_optional(described: dict[str, Any]) -> None:
    assert described["security"] == [{}, {"bearer": []}]
    assert described["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}


def test_speech_is_described_in_each_format(described: dict[str, Any]) -> None:
    operation = described["paths"]["/v1/audio/speech"]["post"]
    assert operation["responses"]["200"]["content"].keys() == {*MEDIA_TYPES.values(), events.MEDIA_TYPE}
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/SpeechRequest")


def test_its_fields_are_the_models(described: dict[str, Any]) -> None:
    schema = described["components"]["schemas"]["SpeechRequest"]
    assert schema["properties"].keys() == SpeechRequest.model_fields.keys()
    assert schema["required"] == ["input"]
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["properties"]["input"]["maxLength"] == MAX_CHARACTERS


def test_the_limit_of_this_server_is_described() -> None:
    schema = document("1", max_characters=500)["components"]["schemas"]["SpeechRequest"]
    assert schema["properties"]["input"]["maxLength"] == 500
    assert document("1")["components"]["schemas"]["SpeechRequest"]["properties"]["input"]["maxLength"] == 4096


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"voice": "fox"},
        {"voice": {"id": "fox"}},
        {"voice": {"id": "a b"}},
        {"voice": {}},
        {"voice": "a b"},
        {"voice": 5},
        {"voice": None, "model": None, "seed": None},
        {"input": ""},
        {"input": "x" * 4096},
        {"input": "x" * 4097},
        {"input": None},
        {"response_format": "opus"},
        {"response_format": "aac"},
        {"stream_format": "sse"},
        {"stream_format": ""},
        {"speed": 1},
        {"speed": 1.1},
        {"seed": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": True},
        {"max_new_tokens": 2},
        {"max_new_tokens": 3},
        {"look_ahead": 3},
        {"look_ahead": 4097},
        {"temperature": 0.05},
        {"temperature": 0},
        {"cfg_weight": 0},
        {"cfg_weight": "0"},
        {"exaggeration": 2},
        {"exaggeration": 2.1},
        {"model": ["a"]},
        {"instructions": "x"},
        {"unknown": [1]},
    ],
    ids=str,
)
def test_what_the_schema_allows_is_taken_and_nothing_else(fields: dict[str, Any], described: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    body = {"input": "Hello.", **fields}
    schema = {"$ref": "#/components/schemas/SpeechRequest", "components": described["components"]}
    try:
        parse_order(json.dumps(body).encode())
        taken = True
    except BadInputError:
        taken = False
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == taken


def test_errors_and_events_are_as_described() -> None:
    error = speech_api.BadFieldError("no", param="seed", next_step="yes")
    fields = speech_api.error_fields(error)
    assert answers.Error.model_validate({"error": fields}).error.param == "seed"
    stream = events.delta(b"ab") + events.done(input_tokens=1, output_tokens=2) + events.failed(fields)
    kinds = [json.loads(block.removeprefix("data: ")) for block in stream.decode().split("\n\n")[:-1]]
    for fields, kind in zip(kinds, get_args(answers.SpeechEvent), strict=True):
        assert kind.model_validate(fields).model_dump() == fields
