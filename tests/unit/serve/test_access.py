"""Access control for scripts, browsers and pages of other sites, with and without a token."""

from __future__ import annotations

import base64
import json
import logging
import os
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.access import Token, check_access, load_token, visible_status
from chatterbox_prewarm.system.children import TOKEN
from tests.conftest import run_cli
from tests.helpers.http_server import basic, connect, request, respond, serving
from tests.helpers.states import record_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from starlette.types import Receive, Scope, Send

SECRET = "correct-horse-battery-staple"
BEARER = {"Authorization": f"Bearer {SECRET}"}
STATUS = {"phase": "ready", "attached": True, "ready": True, "voices": ["fox"], "reasons": ["numba: another CPU"]}
ROUTES = [
    "/",
    "/metrics",
    "/v1/models",
    "/v1/audio/speech",
    "/openapi.json",
    "/nowhere",
    "/livez/",
    "/livez/x",
    "//livez",
]


async def app(scope: Scope, _: Receive, send: Send) -> None:
    """Respond to all requests with the part of a server's status that the client may see."""
    await respond(send, json.dumps(visible_status(scope, STATUS)).encode())


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server that requires the token."""
    with serving(check_access(app, Token(text=SECRET))) as port:
        yield port


@pytest.fixture(scope="module")
def open_port() -> Iterator[int]:
    """A server without a token."""
    with serving(check_access(app, None)) as port:
        yield port


def status(port: int, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> int:
    return request(port, method, path, headers)[0].status


@pytest.mark.parametrize("path", ROUTES)
def test_all_routes_except_probes_require_the_token(port: int, path: str) -> None:
    assert status(port, path) == 401
    assert status(port, path, BEARER) == 200
    assert status(port, path, BEARER, "POST") == 200
    assert status(port, path, method="POST") == 401


def test_a_401_response_has_openais_format_and_names_the_auth_schemes(port: int) -> None:
    response, body = request(port, "GET", "/v1/models")
    challenges = response.headers.get_all("www-authenticate")
    assert challenges is not None
    assert [challenge.partition(" ")[0] for challenge in challenges] == ["Bearer", "Basic"]
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "invalid_request_error"
    assert SECRET not in body.decode()


def test_basic_auth_is_offered_to_page_loads_but_not_to_scripts(port: int) -> None:
    response, _ = request(port, "GET", "/v1/models", {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"})
    assert response.status == 401
    assert response.headers.get_all("www-authenticate") == ['Bearer realm="chatterbox-prewarm"']
    for mode, destination in (("navigate", "document"), ("no-cors", "style"), ("cors", "script")):
        response, _ = request(port, "GET", "/", {"Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": destination})
        assert len(response.headers.get_all("www-authenticate") or []) == 2


@pytest.mark.parametrize("path", ["/livez", "/startupz", "/readyz"])
def test_probes_need_no_token_but_show_only_the_basic_status_without_it(port: int, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        response, body = request(port, "GET", path, headers)
        assert response.status == 200
        assert json.loads(body) == {"phase": "ready", "attached": True, "ready": True}
    assert json.loads(request(port, "GET", path, BEARER)[1]) == STATUS


def test_a_server_without_a_token_shows_everything(open_port: int) -> None:
    assert json.loads(request(open_port, "GET", "/startupz")[1]) == STATUS
    assert status(open_port, "/v1/models") == 200


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Bearer " + SECRET[:-1].encode(),
        b"Bearer " + SECRET.encode() + b"x",
        b"Bearer " + SECRET.upper().encode(),
        b"Bearer " + SECRET.encode() + b"\xff",
        b"Bearer " + "žluťoučký".encode(),
        b"Bearer \xff\xfe",
        b"Bearer " + b"a" * 8000,
        b"Token " + SECRET.encode(),
        SECRET.encode(),
        b"Basic " + SECRET.encode(),
        b"Basic " + base64.b64encode(SECRET.encode()),
        b"Basic " + base64.b64encode(SECRET.encode() + b":"),
        b"Basic " + base64.b64encode(b"x:wrong"),
        b"Basic ====",
        b"Basic \xff",
    ],
)
def test_wrong_and_malformed_tokens_are_refused(port: int, value: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
    with connect(port, head) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_two_authorization_headers_are_refused(port: int) -> None:
    line = f"Authorization: Bearer {SECRET}\r\n".encode()
    with connect(port, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + 2 * line + b"\r\n") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"authorization": f"bearer {SECRET}"},
        {"Authorization": f"BEARER   {SECRET}"},
        basic(SECRET),
        basic(SECRET, user=""),
        basic(SECRET, user="rené"),
    ],
)
def test_the_token_is_accepted_as_bearer_token_and_as_basic_password(port: int, headers: dict[str, str]) -> None:
    assert status(port, "/v1/models", headers) == 200


CROSS_SITE_CASES = [
    ({}, 200),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Host": "tts:8000", "Origin": "http://tts:8000"}, 200),
    ({"Host": "TTS.local", "Origin": "http://tts.local"}, 200),
    ({"Host": "10.0.0.1:8000", "Origin": "http://10.0.0.1:8000"}, 200),
    ({"Host": "[fd00::1]:8000", "Origin": "http://[fd00::1]:8000"}, 200),
    ({"Host": "inside", "X-Forwarded-Host": "tts.example", "Origin": "https://tts.example"}, 200),
    ({"Host": "tts.example", "Origin": "http://evil.example"}, 403),
    ({"Host": "tts.example", "Origin": "null"}, 403),
    ({"Host": "tts.example", "Origin": "http://[::1"}, 403),
    ({"Host": "tts.example", "Origin": "http://tts.example", "Sec-Fetch-Site": "cross-site"}, 403),
]


@pytest.mark.parametrize(("headers", "expected"), CROSS_SITE_CASES)
def test_cross_site_requests_cannot_change_anything_with_the_visitors_credentials(
    port: int, open_port: int, headers: dict[str, str], expected: int
) -> None:
    for method in ("POST", "DELETE"):
        assert status(open_port, "/v1/audio/voices", headers, method) == expected
        assert status(port, "/v1/audio/voices", {**basic(SECRET), **headers}, method) == expected
        assert status(port, "/v1/audio/voices", {**BEARER, **headers}, method) == 200, (
            "a browser does not add a bearer token by itself"
        )
        assert status(port, "/v1/audio/voices", headers, method) == 401
    assert status(open_port, "/v1/audio/voices", headers) == 200, "safe methods are allowed from any site"
    for end in ("", "%0A"):  # Starlette's routes match a final newline
        preview = f"/v1/audio/voices/fox/preview{end}"
        assert status(open_port, preview, headers) == expected, "a preview makes the model speak"


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = tmp_path / "..1", tmp_path / "..2"
    for directory, text in ((first, "first-token-of-a-secret\n"), (second, "second-token-of-it\n")):
        directory.mkdir()
        (directory / "token").write_text(text)
    (tmp_path / "..data").symlink_to(first)  # the kubelet mounts and updates a secret like this
    (tmp_path / "token").symlink_to("..data/token")
    token = load_token(tmp_path / "token", {})
    assert token is not None
    with serving(check_access(app, token)) as port:

        def works(secret: str) -> bool:
            return status(port, "/v1/models", {"Authorization": f"Bearer {secret}"}) == 200

        assert works("first-token-of-a-secret")
        (tmp_path / "..new").symlink_to(second)
        (tmp_path / "..new").replace(tmp_path / "..data")
        assert works("second-token-of-it")
        assert not works("first-token-of-a-secret")
        (second / "token").write_text("")
        assert works("second-token-of-it"), "an empty file changes nothing"
        assert not works("")
        (second / "token").unlink()
        assert works("second-token-of-it")
        assert works("second-token-of-it")
        (second / "token").write_text("third-token-of-this-secret")
        assert works("third-token-of-this-secret")
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("access")]
    assert sum("previous token stays valid" in message for message in messages) == 2
    assert sum("read the token again" in message for message in messages) == 2
    assert "token-of" not in caplog.text


def test_the_token_is_removed_from_the_environment(caplog: pytest.LogCaptureFixture) -> None:
    environment = {TOKEN: SECRET, "HOME": "/"}
    token = load_token(None, environment)
    assert token is not None
    assert token.matches(SECRET.encode())
    assert environment == {"HOME": "/"}
    assert load_token(None, {}) is None
    assert not caplog.records
    assert load_token(None, {TOKEN: "short"}) is not None
    assert "can be guessed" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"two words", "no HTTP header"),
        ("žluťoučký-kůň".encode(), "no HTTP header"),
        (b"line\nline", "no HTTP header"),
        (b"nul\x00", "no HTTP header"),
        (b"a" * 5000, "more than 4096"),
    ],
)
def test_a_token_that_no_client_can_send_is_refused_at_start(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "token").write_bytes(content)
    for path, environment in ((tmp_path / "token", {}), (None, {TOKEN: os.fsdecode(content)})):
        with pytest.raises(BadInputError, match=message) as refused:
            load_token(path, environment)
        assert refused.value.exit_code == 16
        assert "openssl rand" in refused.value.next_step
        assert content.decode("utf-8", "replace").strip() in {"", "line\nline"} or (
            content.decode("utf-8", "replace") not in str(refused.value)
        )


def test_an_unreadable_token_file_is_refused_at_start(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInputError, match="reading the token"):
            load_token(path, {})
    (tmp_path / "token").write_text(SECRET)
    with pytest.raises(BadInputError, match="both contain"):
        load_token(tmp_path / "token", {TOKEN: SECRET})


def test_the_representation_of_a_token_does_not_reveal_it() -> None:
    token = Token(text=SECRET)
    assert SECRET not in f"{token!r} {token} {vars(token)}"


@pytest.mark.parametrize("content", [None, "", "žluťoučký"])
def test_a_server_with_an_invalid_token_file_does_not_start(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    record_weights(tmp_path)
    refused = run_cli("serve", "--token-file", path, "--warm", tmp_path, "--weights", tmp_path)
    assert refused.returncode == 16, refused.stderr
    assert refused.stderr.count("token") >= 2
    assert not content or content not in refused.stderr
