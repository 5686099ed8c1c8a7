"""One log line for each request, and the id by which its client, this line and all others of it can be joined.

A line never holds the text that was to be spoken, unless the server was told to log texts.
"""

from __future__ import annotations

import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.serve.http.access import PROBES
from chatterbox_prewarm.serve.workers.log_lines import REQUEST_ID

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

_KEY = "chatterbox_prewarm.notes"
_HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")
#: Asked every few seconds for the life of a server.
_QUIET = PROBES | {"/metrics"}
_LONGEST_PATH = 200
#: What nginx writes for a client that went away before it was answered; it is never sent.
_CLIENT_GONE = 499


def note(scope: Scope, **fields: Any) -> None:
    """Have the line of this request hold `fields` besides; None is left out.

    By agreement: `characters`, `voice`, `format` and, whether it is logged or not, `text`.
    """
    scope.get(_KEY, {}).update({name: value for name, value in fields.items() if value is not None})


class RequestLog:
    """ASGI middleware, the outermost: gives a request its id, and logs it once it was answered.

    Args:
        app: the application.
        log_text: log the text that was to be spoken as well.
    """

    def __init__(self, app: ASGIApp, *, log_text: bool = False) -> None:
        self._app = app
        self._log_text = log_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, watching what it sends."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id_of(scope)
        # Not reset at the end: each request is a task of its own, and uvicorn's report of a failure comes after us.
        REQUEST_ID.set(request_id)
        notes: dict[str, Any] = {}
        scope[_KEY] = notes
        watch = _Watch(request_id, send)
        try:
            await self._app(scope, receive, watch.send)
        except Exception:
            watch.status = watch.status or 500
            raise
        finally:
            if not self._log_text:
                notes.pop("text", None)
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            logger.log(level, "request", extra={"fields": {**_route(scope), **watch.fields(), **notes}})


class _Watch:
    """What was sent in answer to one request."""

    def __init__(self, request_id: str, send: Send) -> None:
        self._id = request_id.encode()
        self._send = send
        self._started = time.perf_counter()
        self._first: float | None = None
        self._bytes = 0
        self._complete = False
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Pass on a message of the answer."""
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
        """For the log: times in seconds, `first` that to the first byte of the body."""
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


def _id_of(scope: Scope) -> str:
    """The client's own id for this request if it is one that can be logged, else a new one."""
    for name, value in scope["headers"]:
        if name.lower() == _HEADER and _ID.fullmatch(value):
            return str(value.decode("ascii"))
    return os.urandom(8).hex()


def _route(scope: Scope) -> dict[str, str]:
    """Method and path; not the query, in which people put secrets."""
    path = scope["path"]
    return {"method": scope["method"], "route": path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}..."}
