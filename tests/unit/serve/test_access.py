"""Who may ask: with the token and without, as a script, as a browser, and as another site's page in a browser."""

from __future__ import annotations

import base64
import json
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve.http.access import TOKEN, Access, Token, load_token, status_for
from tests.conftest import run_cli
from tests.helpers.http_server import ask, connect, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

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
    """Answers everything with the status of a server, as far as the asker may see it."""
    body = json.dumps(status_for(scope, STATUS)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def guarded(text: str | None = SECRET) -> ASGIApp:
    return Access(app, None if text is None else Token.from_text(text, "the test"))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(guarded()) as port:
        yield port


@pytest.fixture(scope="module")
def open_port() -> Iterator[int]:
    with serving(guarded(None)) as port:
        yield port


def basic(secret: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{secret}".encode()).decode()}


def status(port: int, path: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> int:
    return ask(port, method, path, headers)[0].status


@pytest.mark.parametrize("path", ROUTES)
def test_everything_but_the_probes_demands_the_token(port: int, path: str) -> None:
    assert status(port, path) == 401
    assert status(port, path, BEARER) == 200
    assert status(port, path, BEARER, "POST") == 200
    assert status(port, path, method="POST") == 401


def test_a_refusal_says_how_to_ask_in_openais_shape(port: int) -> None:
    answer, body = ask(port, "GET", "/v1/models")
    challenges = answer.headers.get_all("www-authenticate")
    assert challenges is not None
    assert [challenge.partition(" ")[0] for challenge in challenges] == ["Bearer", "Basic"]
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "invalid_request_error"
    assert SECRET not in body.decode()


def test_a_browser_is_asked_for_a_password_by_the_page_and_its_parts_but_not_by_its_scripts(port: int) -> None:
    answer, _ = ask(port, "GET", "/v1/models", {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"})
    assert answer.status == 401
    assert answer.headers.get_all("www-authenticate") == ['Bearer realm="chatterbox-prewarm"']
    for mode, destination in (("navigate", "document"), ("no-cors", "style"), ("cors", "script")):
        answer, _ = ask(port, "GET", "/", {"Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": destination})
        assert len(answer.headers.get_all("www-authenticate") or []) == 2


@pytest.mark.parametrize("path", ["/livez", "/startupz", "/readyz"])
def test_a_probe_needs_no_token_and_without_it_tells_no_more_than_a_probe_needs(port: int, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer, body = ask(port, "GET", path, headers)
        assert answer.status == 200
        assert json.loads(body) == {"phase": "ready", "attached": True, "ready": True}
    assert json.loads(ask(port, "GET", path, BEARER)[1]) == STATUS


def test_without_a_token_everybody_sees_everything(open_port: int) -> None:
    assert json.loads(ask(open_port, "GET", "/startupz")[1]) == STATUS
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
def test_a_wrong_token_is_refused_whatever_it_looks_like(port: int, value: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: " + value + b"\r\n\r\n"
    with connect(port, head) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_two_tokens_are_none(port: int) -> None:
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
def test_the_token_is_taken_as_a_bearer_or_as_a_password(port: int, headers: dict[str, str]) -> None:
    assert status(port, "/v1/models", headers) == 200


SITES = [
    ({}, 200),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Host": "tts.example:8000", "Origin": "http://tts.example:8000"}, 200),
    ({"Host": "TTS.example", "Origin": "http://tts.example"}, 200),
    ({"Host": "inside", "X-Forwarded-Host": "tts.example", "Origin": "https://tts.example"}, 200),
    ({"Host": "tts.example", "Origin": "http://evil.example"}, 403),
    ({"Host": "tts.example", "Origin": "null"}, 403),
    ({"Host": "tts.example", "Origin": "http://[::1"}, 403),
    ({"Host": "tts.example", "Origin": "http://tts.example", "Sec-Fetch-Site": "cross-site"}, 403),
]


@pytest.mark.parametrize(("headers", "wanted"), SITES)
def test_another_sites_page_cannot_act_in_the_name_of_its_visitor(
    port: int, open_port: int, headers: dict[str, str], wanted: int
) -> None:
    for method in ("POST", "DELETE"):
        assert status(open_port, "/v1/audio/voices", headers, method) == wanted
        assert status(port, "/v1/audio/voices", {**basic(SECRET), **headers}, method) == wanted
        assert status(port, "/v1/audio/voices", {**BEARER, **headers}, method) == 200, "no browser adds that by itself"
        assert status(port, "/v1/audio/voices", headers, method) == 401
    assert status(open_port, "/v1/audio/voices", headers) == 200, "what changes nothing may be asked for from anywhere"


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first, second = tmp_path / "..1", tmp_path / "..2"
    for directory, text in ((first, "first-token-of-a-secret\n"), (second, "second-token-of-it\n")):
        directory.mkdir()
        (directory / "token").write_text(text)
    (tmp_path / "..data").symlink_to(first)  # as the kubelet mounts a secret, and changes it
    (tmp_path / "token").symlink_to("..data/token")
    token = load_token(tmp_path / "token", {})
    assert token is not None
    with serving(Access(app, token)) as port:

        def works(secret: str) -> bool:
            return status(port, "/v1/models", {"Authorization": f"Bearer {secret}"}) == 200

        assert works("first-token-of-a-secret")
        (tmp_path / "..new").symlink_to(second)
        (tmp_path / "..new").replace(tmp_path / "..data")
        assert works("second-token-of-it")
        assert not works("first-token-of-a-secret")
        (second / "token").write_text("")
        assert works("second-token-of-it"), "an empty file opens the server to nobody and closes it to nobody"
        assert not works("")
        (second / "token").unlink()
        assert works("second-token-of-it")
        assert works("second-token-of-it")
        (second / "token").write_text("third-token-of-this-secret")
        assert works("third-token-of-this-secret")
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("access")]
    assert sum("stays what it was" in message for message in messages) == 2
    assert sum("was read again" in message for message in messages) == 2
    assert "token-of" not in caplog.text


def test_the_environments_token_is_taken_out_of_the_environment(caplog: pytest.LogCaptureFixture) -> None:
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
    ("content", "says"),
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
def test_a_token_that_nobody_could_send_is_refused_at_the_start(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "token").write_bytes(content)
    for path, environment in ((tmp_path / "token", {}), (None, {TOKEN: os.fsdecode(content)})):
        with pytest.raises(BadInputError, match=says) as refused:
            load_token(path, environment)
        assert refused.value.exit_code == 16
        assert "openssl rand" in refused.value.next_step
        assert content.decode("utf-8", "replace").strip() in {"", "line\nline"} or (
            content.decode("utf-8", "replace") not in str(refused.value)
        )


def test_a_token_file_that_cannot_be_read_is_refused_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInputError, match="reading the token"):
            load_token(path, {})
    (tmp_path / "token").write_text(SECRET)
    with pytest.raises(BadInputError, match="both by"):
        load_token(tmp_path / "token", {TOKEN: SECRET})


def test_no_text_of_a_token_shows_it() -> None:
    token = Token.from_text(SECRET, "the test")
    shown: list[Any] = [repr(token), str(token), repr(vars(token))]
    assert not [text for text in shown if SECRET in text]


@pytest.mark.parametrize("content", [None, "", "žluťoučký"])
def test_a_server_does_not_start_without_the_token_that_it_was_told_to_demand(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    refused = run_cli("serve", "--token-file", path, "--warm", tmp_path, "--weights", tmp_path)
    assert refused.returncode == 16, refused.stderr
    assert refused.stderr.count("token") >= 2
    assert not content or content not in refused.stderr
