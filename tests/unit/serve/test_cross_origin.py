"""Test which pages of other sites may use the server from a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.access import Token, check_access
from chatterbox_prewarm.serve.http.cross_origin import allow_origins, parse_origin
from tests.conftest import run_cli
from tests.helpers.http_server import basic, request, respond, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import Receive, Scope, Send

SECRET = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {SECRET}"}
CHAT = "https://chat.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


async def app(_: Scope, __: Receive, send: Send) -> None:
    await respond(send, b"{}")


@pytest.fixture(scope="module", params=[SECRET, ""])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """A server that allows one origin, with a token and without one."""
    token = Token(text=request.param) if request.param else None
    with serving(allow_origins(check_access(app, token, [CHAT]), [CHAT])) as port:
        yield port


def test_a_preflight_of_an_allowed_origin_needs_no_token(port: int) -> None:
    response, _ = request(port, "OPTIONS", "/v1/audio/speech", {"Origin": CHAT, **PREFLIGHT})
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == CHAT
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "authorization" in response.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in response.headers


def test_an_allowed_page_can_request_speech_and_read_it(port: int) -> None:
    headers = {"Origin": CHAT, "Sec-Fetch-Site": "cross-site", "Host": "tts.example", **BEARER}
    response, _ = request(port, "POST", "/v1/audio/speech", headers)
    assert response.status == 200
    assert response.headers["access-control-allow-origin"] == CHAT


def test_another_page_is_refused_and_cannot_read_anything(port: int) -> None:
    evil = {"Origin": "https://evil.example", "Host": "tts.example"}
    response, _ = request(port, "OPTIONS", "/v1/audio/speech", {**evil, **PREFLIGHT})
    assert response.status == 400
    assert "access-control-allow-origin" not in response.headers
    for headers in ({**evil, **basic(SECRET)}, {**evil, **basic(SECRET), "Sec-Fetch-Site": "cross-site"}):
        response, body = request(port, "POST", "/v1/audio/speech", headers)
        assert response.status == 403
        assert b"--allow-origin" in body
        assert "access-control-allow-origin" not in response.headers


def test_a_stored_password_does_not_count_for_a_page_of_an_allowed_origin(port: int) -> None:
    headers = {"Origin": CHAT, "Sec-Fetch-Site": "cross-site", "Host": "tts.example", **basic(SECRET)}
    assert request(port, "POST", "/v1/audio/speech", headers)[0].status == 403


def test_without_a_token_an_allowed_page_needs_none() -> None:
    headers = {"Origin": CHAT, "Sec-Fetch-Site": "cross-site", "Host": "tts.example"}
    for origins, expected in (([CHAT], 200), (["*"], 200), ([], 403), (["https://other.example"], 403)):
        with serving(allow_origins(check_access(app, None, origins), origins)) as port:
            assert request(port, "POST", "/v1/audio/speech", headers)[0].status == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", "*"),
        ("https://chat.example", CHAT),
        ("https://Chat.example/", CHAT),
        ("https://chat.example:443", CHAT),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
    ],
)
def test_an_origin_gets_the_form_that_browsers_send(text: str, expected: str) -> None:
    assert parse_origin(text) == expected


@pytest.mark.parametrize(
    "text", ["", "null", "chat.example", "ftp://chat.example", "https://chat.example/a", "http://[::1"]
)
def test_other_texts_are_no_origins(text: str) -> None:
    with pytest.raises(BadInputError, match="is not the origin of a page"):
        parse_origin(text)


def test_serve_refuses_an_invalid_origin() -> None:
    refused = run_cli("serve", "--allow-origin", "chat.example")
    assert refused.returncode == 16
    assert "write it as https://chat.example" in refused.stderr
