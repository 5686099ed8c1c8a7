"""Log lines of requests: their fields, their request id, and protection against forged lines and leaked texts."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from starlette.routing import Route

from chatterbox_prewarm.serve.http.request_log import add_log_fields, log_requests
from chatterbox_prewarm.serve.workers import log_lines
from chatterbox_prewarm.serve.workers.log_lines import REQUEST_ID, JsonLines, TextLines
from tests.helpers.http_server import connect, request, respond, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Receive, Scope, Send

TEXT = "The patient's name is Nemo."
logger = logging.getLogger("chatterbox_prewarm.test")


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Speak, fail, or wait for the client to disconnect, depending on the path."""
    match scope["path"]:
        case "/v1/audio/speech":
            add_log_fields(
                scope, text=TEXT, characters=len(TEXT), voice="fox", format="wav", device="cuda:0", seed=None
            )
            logger.info("speaking")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for size in (0, 40, 60):
                await asyncio.sleep(0.02)
                await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
            await send({"type": "http.response.body"})
        case "/fails":
            raise RuntimeError("an exception")
        case "/fails/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            raise RuntimeError("a late exception")
        case "/gone":
            while (await receive())["type"] != "http.disconnect":
                pass
        case _:
            await respond(send)


def logged(**options: Any) -> ASGIApp:
    paths = ("/", "/v1/audio/speech", "/fails", "/gone", "/livez", "/startupz", "/readyz", "/metrics", "/v1/models")
    return log_requests(app, [Route(path, app) for path in (*paths, "/v1/audio/voices/{name}")], **options)


def test_a_path_is_logged_only_with_the_option_log_text() -> None:
    paths = ("/v1/audio/voices/Nemo", "/The%20patient%20Nemo")
    for log_text, routes in ((False, ["/v1/audio/voices/{name}", "unknown"]), (True, [unquote(p) for p in paths])):
        with collect_log(JsonLines("front")) as log, serving(logged(log_text=log_text)) as port:
            for path in paths:
                request(port, "DELETE", path)
        assert [line["route"] for line in log.parsed("request")] == routes


class LogCollector(logging.Handler):
    """Formats log records in the task that logs them, and keeps the lines."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def parsed(self, message: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.lines) if line["message"] == message]


@contextlib.contextmanager
def collect_log(formatter: logging.Formatter, level: int = logging.INFO) -> Iterator[LogCollector]:
    handler = LogCollector(formatter)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


def test_each_request_logs_one_line_with_its_fields_and_without_its_text() -> None:
    with collect_log(JsonLines("front")) as log, serving(logged()) as port:
        response, _ = request(port, "POST", "/v1/audio/speech?key=secret", {"X-Request-Id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
    (line,) = log.parsed("request")
    assert {name: line[name] for name in ("method", "route", "status", "bytes")} == {
        "method": "POST",
        "route": "/v1/audio/speech",
        "status": 200,
        "bytes": 100,
    }
    assert line["characters"] == len(TEXT)
    assert (line["voice"], line["format"], line["device"]) == ("fox", "wav", "cuda:0")
    assert 0.03 < line["first"] < line["seconds"] < 5
    assert line["request_id"] == "abc-1"
    assert line["process"] == "front"
    assert line["time"].endswith("Z")
    assert "seed" not in line
    assert "cut" not in line
    all_lines = "\n".join(log.lines)
    assert "Nemo" not in all_lines
    assert "secret" not in all_lines


def test_the_text_is_logged_with_the_option_log_text() -> None:
    with collect_log(JsonLines("front")) as log, serving(logged(log_text=True)) as port:
        request(port, "POST", "/v1/audio/speech")
    assert log.parsed("request")[0]["text"] == TEXT


def test_other_log_lines_during_a_request_have_its_id() -> None:
    with collect_log(JsonLines("front")) as log, serving(logged()) as port:
        ids = [request(port, "POST", "/v1/audio/speech")[0].headers["x-request-id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert [line["request_id"] for line in log.parsed("speaking")] == ids
    assert [line["request_id"] for line in log.parsed("request")] == ids
    assert REQUEST_ID.get() is None


@pytest.mark.parametrize(
    "value", [b"", b"a b", b"x" * 129, b"a\xff", b"\xc5\xbe", b"-a", b'a"', b"<script>", b"a\x1b[31m", b"a;b"]
)
def test_an_unsafe_request_id_is_replaced(value: bytes) -> None:
    with collect_log(JsonLines("front")) as log, serving(logged()) as port:
        head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + value + b"\r\n\r\n"
        with connect(port, head) as connection:
            received = connection.recv(4096)
    if b" 400 " in received.partition(b"\r\n")[0]:
        assert not log.parsed("request"), "h11 has refused the request"
        return
    (line,) = log.parsed("request")
    assert line["request_id"].encode() != value
    assert f"x-request-id: {line['request_id']}\r\n".encode() in received


def test_probes_and_scrapes_are_logged_only_at_debug_level() -> None:
    paths = ("/livez", "/startupz", "/readyz", "/metrics", "/v1/models")
    for level, expected in ((logging.INFO, ["/v1/models"]), (logging.DEBUG, list(paths))):
        with collect_log(JsonLines("front"), level) as log, serving(logged()) as port:
            for path in paths:
                assert "x-request-id" in request(port, "GET", path)[0].headers
        assert [line["route"] for line in log.parsed("request")] == expected


def test_an_exception_is_logged_with_the_request_id_and_the_sent_status() -> None:
    with collect_log(JsonLines("front")) as log, serving(logged()) as port:
        assert request(port, "GET", "/fails", {"X-Request-Id": "it"})[0].status == 500
        with connect(port, b"GET /fails/late HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
            while connection.recv(4096):
                pass
    first, late = log.parsed("request")
    assert first["status"] == 500
    assert (late["status"], late["cut"]) == (200, True)
    exceptions = [json.loads(line) for line in log.lines if "an exception" in line]
    assert [line["request_id"] for line in exceptions] == ["it"]
    assert "RuntimeError: an exception" in exceptions[0]["traceback"]


def test_a_disconnected_client_is_logged_with_status_499() -> None:
    with collect_log(JsonLines("front")) as log, serving(logged()) as port:
        connect(port, b"GET /gone HTTP/1.1\r\nHost: x\r\n\r\n").close()
        request(port, "GET", "/")
    assert sorted((line["route"], line["status"]) for line in log.parsed("request")) == [("/", 200), ("/gone", 499)]


FORGED = "a\n2026-01-01 00:00:00,000 front INFO forged\r\x1b[2K\u2028b\x85c\x00"


def formatted(formatter: logging.Formatter, **fields: Any) -> str:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "said %s", (FORGED,), None)
    record.fields = fields
    return formatter.format(record)


def test_a_message_or_field_cannot_forge_a_log_line() -> None:
    line = formatted(TextLines("front"), route=FORGED, voice="f ox", seconds=1.23456, status=200)
    assert line.isprintable(), repr(line)
    assert line.endswith('voice="f ox" seconds=1.235 status=200')
    parsed = json.loads(formatted(JsonLines("front"), route=FORGED))
    assert "\n" not in formatted(JsonLines("front"), route=FORGED)
    assert parsed["message"] == f"said {FORGED}"
    assert parsed["route"] == FORGED


def test_a_path_cannot_forge_a_log_line() -> None:
    with collect_log(TextLines("front")) as log, serving(logged(log_text=True)) as port:
        request(port, "GET", "/a%0A2026-01-01%20front%20INFO%20forged%1B%5B2K")
        request(port, "GET", "/" + "a" * 5000)
    lines = [line for line in log.lines if " request " in line]
    assert len(lines) == 2
    assert all(line.isprintable() and len(line) < 600 for line in lines)
    assert r'route="/a\n2026-01-01 front INFO forged\u001b[2K"' in lines[0]


def test_a_traceback_is_indented_and_escaped() -> None:
    try:
        int(FORGED)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    first, *rest = TextLines("worker").format(record).split("\n")
    assert first.endswith("worker ERROR failed")
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert "ValueError" in json.loads(JsonLines("worker").format(record))["traceback"]


@pytest.mark.parametrize("log_format", log_lines.FORMATS)
def test_a_process_logs_in_the_configured_format(log_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    log_lines.install(log_format, process="worker cuda:0", level=logging.INFO)
    logger.info("hello %s", "there")
    line = stream.getvalue()
    assert line.count("\n") == 1
    if log_format == "json":
        assert json.loads(line)["message"] == "hello there"
    else:
        assert line.endswith(" worker cuda:0 INFO hello there\n")
