"""One log line per request, and a request id that the client can match with all log lines of the request.

A log line contains the text of a speech request only if the server was started with the option to log texts.
"""

from __future__ import annotations

import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any

from starlette.routing import Match

from chatterbox_prewarm.serve.http.access import is_probe
from chatterbox_prewarm.serve.workers.log_lines import REQUEST_ID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_KEY = "chatterbox_prewarm.log_fields"
_HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
_METRICS = "/metrics"
_MAX_PATH = 200
#: The route of a path that the server does not have.
_NO_ROUTE = "unknown"
#: The status that nginx logs for a client that disconnected before the response. It is never sent.
_CLIENT_GONE = 499


def add_log_fields(scope: Scope, **fields: Any) -> None:
    """Add fields to the log line of this request. A value of None is left out.

    The routes use `model`, `characters`, `source_seconds`, `voice`, `format`, `truncated`, `skipped` and `text`.
    Without `log_text`, the log omits `text`.
    """
    scope.get(_KEY, {}).update({name: value for name, value in fields.items() if value is not None})


def log_requests(app: ASGIApp, routes: Sequence[BaseRoute], *, log_text: bool = False) -> ASGIApp:
    """Wrap `app` in the outermost middleware, which assigns request ids and logs each request after its response.

    Args:
        app: the application.
        routes: its routes. The log contains the template of a route, because a path may contain any text.
        log_text: True to log the text of speech requests, and complete paths.
    """

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        request_id = _request_id(scope)
        # The id is not reset afterwards: each request has a task with a context, and uvicorn logs an exception later.
        REQUEST_ID.set(request_id)
        fields: dict[str, Any] = {}
        scope[_KEY] = fields
        response = _LoggedResponse(request_id, send)
        route = _shortened(scope["path"]) if log_text else _template(routes, scope)
        try:
            await app(scope, receive, response.send)
        except Exception:
            response.status = response.status or 500
            raise
        finally:
            if not log_text:
                fields.pop("text", None)
            # Kubernetes and Prometheus request these paths every few seconds.
            level = logging.DEBUG if is_probe(scope["path"]) or scope["path"] == _METRICS else logging.INFO
            logger.log(
                level,
                "request",
                extra={"fields": {"method": scope["method"], "route": route, **response.fields(), **fields}},
            )

    return middleware


class _LoggedResponse:
    """Passes on the messages of one response, and records its status, size and times."""

    def __init__(self, request_id: str, send: Send) -> None:
        self._id = request_id.encode()
        self._send = send
        self._started = time.perf_counter()
        self._first: float | None = None
        self._bytes = 0
        self._complete = False
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Pass on a message, with the request id added to the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (_HEADER, self._id)]
        elif message["type"] == "http.response.body":
            size = len(message.get("body", b""))
            if size and self._first is None:
                self._first = time.perf_counter() - self._started
            self._bytes += size
            self._complete = not message.get("more_body", False)
        await self._send(message)

    def fields(self) -> dict[str, Any]:
        """Return the log fields. Times are in seconds; `first` is the time to the first byte of the body."""
        fields = {
            "status": self.status or _CLIENT_GONE,
            "seconds": round(time.perf_counter() - self._started, 6),
            "bytes": self._bytes,
        }
        if self._first is not None:
            fields["first"] = round(self._first, 6)
        if self.status is not None and not self._complete:
            fields["cut"] = True
        return fields


def _request_id(scope: Scope) -> str:
    """Return the client's request id if it is safe to log, or a new id."""
    for name, value in scope["headers"]:
        if name.lower() == _HEADER and _ID.fullmatch(value):
            return str(value.decode("ascii"))
    return os.urandom(8).hex()


def _template(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the template of the route that matches the path, even if it does not support the method."""
    for route in routes:
        if route.matches(scope)[0] is not Match.NONE:
            return str(getattr(route, "path", _NO_ROUTE))
    return _NO_ROUTE


def _shortened(path: str) -> str:
    return path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}..."
