"""The OpenAPI document is valid and complete, and agrees with the code that checks requests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, get_args

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.serve.http.encoding import MEDIA_TYPES

pytest.importorskip("pydantic")

from pydantic import TypeAdapter

from chatterbox_prewarm.serve.http import error_responses, events, schemas
from chatterbox_prewarm.serve.http.openapi import build_document
from chatterbox_prewarm.serve.http.speech_request import SpeechRequest, parse_speech_options
from chatterbox_prewarm.weights.variants import TURBO

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTES = {
    "/": {"get"},
    "/livez": {"get"},
    "/startupz": {"get"},
    "/readyz": {"get"},
    "/readyz/{model}": {"get"},
    "/metrics": {"get"},
    "/openapi.json": {"get"},
    "/v1/models": {"get"},
    "/v1/models/{model}": {"get"},
    "/v1/audio/speech": {"post"},
    "/v1/audio/conversions": {"post"},
    "/v1/audio/voices": {"get", "post"},
    "/v1/audio/voices/{name}": {"get", "delete"},
    "/v1/audio/voices/{name}/preview": {"get"},
}
PROBES = {"/livez", "/startupz", "/readyz", "/readyz/{model}"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document("1.2.3")


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
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


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.OpenAPIV31SpecValidator(document).validate()


def test_the_document_is_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == "1.2.3"


def test_the_document_has_all_routes(document: dict[str, Any]) -> None:
    assert {path: set(item) - {"parameters"} for path, item in document["paths"].items()} == ROUTES


def test_all_references_resolve_and_all_components_are_used(document: dict[str, Any]) -> None:
    used = set(refs(document))
    for ref in used:
        value: Any = document
        for key in ref.removeprefix("#/").split("/"):
            value = value[key]
    components = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "parameters")
        for name in document["components"][kind]
    }
    assert components == used


def test_all_operations_are_complete(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for *_, operation in operations(document)]
    assert len(names) == len(set(names))
    for path, method, operation in operations(document):
        assert operation["summary"]
        assert any(status.startswith("2") for status in operation["responses"])
        assert all(re.fullmatch("[2-5][0-9]{2}", status) for status in operation["responses"])
        assert ("401" in operation["responses"]) == (path not in PROBES)
        assert operation.get("security") == ([] if path in PROBES else None)
        assert ("requestBody" in operation) == (method == "post")
        if "requestBody" in operation:
            assert {"400", "408", "413", "415", "429", "503"} <= operation["responses"].keys()
        parameters = document["paths"][path].get("parameters", [])
        expected = {"{name}": "voice", "{model}": "model"}
        assert [parameter["$ref"] for parameter in parameters] == [
            f"#/components/parameters/{component}" for name, component in expected.items() if name in path
        ]


def test_a_token_is_optional(document: dict[str, Any]) -> None:
    assert document["security"] == [{}, {"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}


def test_the_speech_route_lists_all_formats(document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/audio/speech"]["post"]
    assert operation["responses"]["200"]["content"].keys() == {*MEDIA_TYPES.values(), events.MEDIA_TYPE}
    assert operation["responses"]["200"]["headers"].keys() == {"X-Finish-Reason", "X-Skipped-Parts"}
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/SpeechRequest")


def test_the_request_schema_has_the_fields_of_the_model(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["SpeechRequest"]
    assert schema["properties"].keys() == SpeechRequest.model_fields.keys() - {"top_k"}
    turbo = build_document("1", settings=tuple(TURBO.controls))["components"]["schemas"]["SpeechRequest"]
    assert SpeechRequest.model_fields.keys() - turbo["properties"].keys() == {"cfg_weight", "exaggeration", "min_p"}
    assert schema["required"] == ["input"]
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["properties"]["input"]["maxLength"] == MAX_CHARACTERS


def test_the_text_limit_of_the_server_is_in_the_schema() -> None:
    schema = build_document("1", max_characters=500)["components"]["schemas"]["SpeechRequest"]
    assert schema["properties"]["input"]["maxLength"] == 500
    assert build_document("1")["components"]["schemas"]["SpeechRequest"]["properties"]["input"]["maxLength"] == 4096


def test_a_server_that_ignores_the_speed_allows_any_in_the_schema() -> None:
    schema = build_document("1", ignore_speed=True)["components"]["schemas"]["SpeechRequest"]
    assert schema["properties"]["speed"].keys() == {"description"}


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
def test_the_server_accepts_exactly_what_the_schema_allows(fields: dict[str, Any], document: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    body = {"input": "Hello.", **fields}
    schema = {"$ref": "#/components/schemas/SpeechRequest", "components": document["components"]}
    try:
        parse_speech_options(json.dumps(body).encode())
        accepted = True
    except BadInputError:
        accepted = False
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == accepted


def test_errors_and_events_match_their_schemas() -> None:
    error = error_responses.RequestError("no", param="seed", next_step="yes")
    fields = error_responses.error_fields(error)
    assert TypeAdapter(schemas.Error).validate_python({"error": fields})["error"]["param"] == "seed"
    done = events.done(input_tokens=1, output_tokens=2, finish_reason="stop", skipped_parts=0)
    stream = events.delta(b"ab") + done + events.failed(fields)
    sent = [json.loads(block.removeprefix("data: ")) for block in stream.decode().split("\n\n")[:-1]]
    for event, shape in zip(sent, get_args(schemas.SpeechEvent), strict=True):
        assert TypeAdapter(shape).validate_python(event, strict=True) == event
