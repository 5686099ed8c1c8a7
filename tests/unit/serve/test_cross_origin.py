"""Test which pages of other sites may use the server from a browser."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.access import Token, check_access
from chatterbox_prewarm.serve.http.cross_origin import Sites, allow_origins, parse_host, parse_origin
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
    with serving(allow_origins(check_access(app, token, Sites(origins=[CHAT])), [CHAT])) as port:
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
    assert response.headers["access-control-expose-headers"] == "Retry-After, X-Finish-Reason, X-Skipped-Parts"


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
        with serving(allow_origins(check_access(app, None, Sites(origins=origins)), origins)) as port:
            assert request(port, "POST", "/v1/audio/speech", headers)[0].status == expected


#: Requests of a page that has the same name as this server: headers, and the status without and with --allowed-host.
SAME_NAME = [
    ({"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 403, 403),
    ({"Host": "localhost.evil.example", "Origin": "http://localhost.evil.example"}, 403, 403),
    ({"Host": "evil.example", "Origin": "http://evil.example", "Authorization": "Bearer any"}, 403, 403),
    ({"Host": "x", "X-Forwarded-Host": "evil.example", "Origin": "http://evil.example"}, 403, 403),
    ({"Host": "tts.example", "Origin": "http://tts.example"}, 403, 200),
    ({"Host": "TTS.example.:8000", "Origin": "http://tts.example:8000"}, 403, 200),
    ({"Host": "tts.example", "Origin": "http://tts.example:8080"}, 403, 200),  # a proxy has dropped the port
    ({"Host": "127.0.0.1:8000", "Origin": "http://tts.example"}, 403, 200),  # a proxy has replaced the host
    ({"Host": "other.example:81", "Origin": "http://other.example:81"}, 403, 200),
    ({"Host": "other.example:82", "Origin": "http://other.example:82"}, 403, 403),
    ({"Host": "tts.example", "Origin": "https://tts.example"}, 200, 200),
    ({"Host": "tts.other", "Origin": "https://tts.other"}, 200, 403),
    ({"Host": "tts.localhost:8000", "Origin": "http://tts.localhost:8000"}, 200, 200),
    ({"Host": "tts.example"}, 200, 200),
    ({"Host": "chatterbox.default.svc"}, 200, 403),
    ({"Host": "127.0.0.1:8000"}, 200, 200),
    ({"Host": "chatterbox"}, 200, 200),
]


def test_a_page_cannot_use_the_server_under_a_name_that_it_has_chosen() -> None:
    named = Sites(hosts=(parse_host("TTS.example"), parse_host("other.example:81")))
    with serving(check_access(app, None)) as default, serving(check_access(app, None, named)) as strict:
        for headers, by_default, with_names in SAME_NAME:
            assert request(default, "POST", "/v1/audio/speech", headers)[0].status == by_default, headers
            assert request(strict, "POST", "/v1/audio/speech", headers)[0].status == with_names, headers
        evil = {"Host": "evil.example"}
        assert request(default, "GET", "/v1/audio/voices", evil)[0].status == 200
        response, body = request(strict, "GET", "/v1/audio/voices", evil)
        assert (response.status, json.loads(body)["error"]["code"]) == (403, "unknown_host")
        assert request(strict, "GET", "/livez", evil)[0].status == 200


def test_a_stored_password_shows_that_the_visitor_knows_the_name() -> None:
    headers = {"Host": "tts.example:8000", "Origin": "http://tts.example:8000", **basic(SECRET)}
    with serving(check_access(app, Token(text=SECRET))) as port:
        assert request(port, "POST", "/v1/audio/speech", headers)[0].status == 200


def test_the_refusal_advises_a_token_only_if_the_server_has_one(port: int) -> None:
    headers = {"Host": "127.0.0.1", "Origin": "http://tts.example", **basic(SECRET)}
    message = json.loads(request(port, "POST", "/v1/audio/speech", headers)[1])["error"]["message"]
    assert "'http://tts.example'" in message
    assert "--allowed-host" in message
    with serving(check_access(app, None)) as without:
        shorter = json.loads(request(without, "POST", "/v1/audio/speech", headers)[1])["error"]["message"]
    assert "token" not in shorter


@pytest.mark.parametrize("text", ["tts.example:80", "tts.example:443"])
def test_a_default_port_is_refused_because_browsers_leave_it_out(text: str) -> None:
    with pytest.raises(BadInputError, match=r"(?s)default port.*write it as tts\.example$"):
        parse_host(text)


@pytest.mark.parametrize("text", ["", "https://tts.example", "tts.example/a", "a b:x", "user@tts.example", "[::1"])
def test_other_texts_are_no_hosts(text: str) -> None:
    with pytest.raises(BadInputError, match="is not the name of a host"):
        parse_host(text)


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
