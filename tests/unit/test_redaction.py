"""Test that secrets do not get into messages, log lines and tracebacks."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.redaction import RedactedFormatter, redact
from chatterbox_prewarm.serve.workers.log_lines import JsonLines, TextLines
from tests.conftest import run_cli

SECRET = "s3cr3t-P4ss/w0rd".replace("/", "-")
TOKEN = "abcDEF0123456789abcDEF0123456789"

WITH_SECRET = [
    f"http://bob:{SECRET}@registry.example/v2/",
    f"cannot reach https://{SECRET}@registry.example: refused",
    f"https://bob:p@{SECRET}@registry.example/x",
    f"--base bob:{SECRET}@registry.example/image:tag",
    f"Authorization: Basic {TOKEN}",
    f"authorization: bearer {TOKEN}",
    f"{{'Authorization': 'Bearer {TOKEN}'}}",
    f'{{"Authorization": "Basic {TOKEN}"}}',
    f"(b'Authorization', b'Bearer {TOKEN}')",
    f"Proxy-Authorization: {TOKEN}",
    f"X-Registry-Auth: {TOKEN}",
    f"Cookie: session={TOKEN}",
    f"got 401 for Bearer {TOKEN}",
    f"https://cdn.example/blob?X-Amz-Signature={TOKEN}&X-Amz-Date=1",
    f"GET https://cas.example/x?Policy=a&Signature={TOKEN} failed",
    f"CHATTERBOX_PREWARM_TOKEN={SECRET}",
    f"HF_TOKEN={SECRET} is wrong",
    f'{{"username": "bob", "password": "{SECRET}"}}',
    f"{{'identitytoken': '{TOKEN}'}}",
    f'{{"auths": {{"r.example": {{"auth": "{TOKEN}"}}}}}}',
    f"api_key={SECRET}",
    f"aws_secret_access_key={SECRET}",
    f"the token hf_{TOKEN} is invalid",
    f"ghp_{TOKEN}",
    f"eyJhbGciOiJIUzI1NiJ9.{TOKEN}.{TOKEN}",
]

WITHOUT_SECRET = [
    "chatterbox:warm@sha256:0123456789abcdef",
    "registry.example:5000/speech@sha256:0123",
    "max_new_tokens=50 tokens: 200",
    "the server requires a bearer token, and the request has no valid one",
    "Basic authentication is not supported",
    "http://localhost:8000/v1/audio/speech",
    "write it as NAME=VOICE, with --voice-alias",
    "sha256 0123 expected, 4567 found",
    "no token of 25 per second",
    "git@github.example is a user name alone",
]


@pytest.mark.parametrize("text", WITH_SECRET)
def test_a_secret_is_hidden_everywhere(text: str) -> None:
    error = BadInputError(text, next_step=text)
    record = logging.LogRecord("test", logging.INFO, "file", 1, "%s", (text,), None)
    try:
        int(text)
    except ValueError:  # its message contains the text
        with_traceback = logging.LogRecord("test", logging.ERROR, "file", 1, "failed", (), sys.exc_info())
    seen = [redact(text), error.message, error.next_step, str(error), repr(error)]
    for formatter in (RedactedFormatter(), TextLines("front"), JsonLines("front")):
        seen += [formatter.format(record), formatter.format(with_traceback)]
    for one in seen:
        assert SECRET not in one
        assert TOKEN not in one
        assert "***" in one
    json.loads(JsonLines("front").format(record))


@pytest.mark.parametrize("text", WITHOUT_SECRET)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


def test_redaction_is_stable() -> None:
    for text in WITH_SECRET:
        assert redact(redact(text)) == redact(text)


def test_the_command_line_prints_no_password_of_a_base() -> None:
    base = f"http://bob:{SECRET}@localhost:1/image:tag"
    for options in ([], ["--debug"]):
        refused = run_cli(*options, "append", "--base", base, "--to", "localhost:1/image:warm", "--warm", "/nowhere")
        assert refused.returncode != 0
        assert SECRET not in refused.stdout + refused.stderr


def test_a_log_handler_hides_secrets_of_other_packages() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactedFormatter("%(message)s"))
    logger = logging.Logger("requests")
    logger.addHandler(handler)
    logger.warning("redirected to %s", f"https://cdn.example/x?sig={TOKEN}")
    assert stream.getvalue() == "redirected to https://cdn.example/x?***\n"
