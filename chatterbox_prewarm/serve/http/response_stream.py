"""The response to one speech request: an error, a complete file, or a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

    from chatterbox_prewarm.serve.http.schemas import FinishReason

_PIECE_BYTES = 1 << 16


class ResponseStream:
    """One HTTP response, sent at once or in parts.

    Attributes:
        status: the HTTP status; 0 before the start.
        finish_reason: "length" once a part of the text has reached the token limit.
        skipped_parts: number of parts of the text that were left out so far.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self.status = 0
        self.finish_reason: FinishReason = "stop"
        self.skipped_parts = 0

    async def send(self, response: Response) -> None:
        """Send a complete response."""
        self.status = response.status_code
        await response(self.scope, self._receive, self._send)

    async def send_file(self, media_type: str, content: bytes) -> None:
        """Send a complete file. uvicorn holds a copy of a few pieces, not of the file."""
        await self.start(media_type, size=len(content))
        for begin in range(0, len(content), _PIECE_BYTES):
            await self.write(content[begin : begin + _PIECE_BYTES])
        await self.end()

    async def start(self, media_type: str, *, size: int | None = None) -> None:
        """Send status 200 and the headers, unless this has been done before.

        Args:
            media_type: of the body.
            size: of the body in bytes, if it is complete.
        """
        if self.status:
            return
        self.status = 200
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
        if size is None:
            headers.append((b"x-accel-buffering", b"no"))  # nginx would hold the first audio until its buffer is full
        else:
            headers.append((b"content-length", b"%d" % size))
        # In a stream, a later part may still reach the limit or be left out.
        if size is not None or self.finish_reason == "length":
            headers.append((b"x-finish-reason", self.finish_reason.encode()))
        if size is not None or self.skipped_parts:
            headers.append((b"x-skipped-parts", b"%d" % self.skipped_parts))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, data: bytes) -> None:
        """Send a part of the body. Waits while the client reads too slowly."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Complete the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def disconnected(self) -> None:
        """Return when the client has disconnected."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
