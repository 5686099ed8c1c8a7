"""Read request bodies, with limits on their encoding, size and time."""

from __future__ import annotations

import asyncio
import reprlib
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.http.error_responses import RequestError

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.requests import Request

_BODY_SECONDS = 10.0
_BODY_BYTES = 1 << 20
#: Every request may use this much memory for its body: enough for the default limit of 4096 characters in any encoding.
_OWN_BYTES = 1 << 16
#: The memory that larger bodies share.
_SHARED_BYTES = 1 << 26


def check_encoding(headers: Headers) -> None:
    """Check that a request body is not compressed. A small compressed body could become a very large one.

    Raises:
        RequestError: the header `Content-Encoding` names an encoding (status 415).
    """
    encodings = [name.strip() for value in headers.getlist("content-encoding") for name in value.split(",")]
    for encoding in encodings:
        if encoding.lower() not in {"", "identity"}:
            raise RequestError(
                f"the body has the encoding {reprlib.repr(encoding)}, and this server reads only uncompressed bodies",
                next_step="send the body uncompressed, without a header Content-Encoding",
                status=415,
                code="unsupported_encoding",
            )


class BodyReader:
    """Reads request bodies of limited size within a limited time.

    A body of the usual size has its own memory. Larger bodies share a fixed amount, so that many clients that withhold
    the end of a large body cannot fill the memory, and requests of the usual size still succeed.
    """

    def __init__(self) -> None:
        self._shared = 0

    async def read(self, request: Request) -> bytes:
        """Read the body of a request.

        Raises:
            RequestError: the body is compressed (status 415), too large (status 413) or too slow (status 408), or too
                many large bodies arrive at the same time (status 429).
        """
        check_encoding(request.headers)
        try:
            return await asyncio.wait_for(self._read(request), _BODY_SECONDS)
        except (asyncio.TimeoutError, TimeoutError) as error:
            message = f"the body did not arrive within {_BODY_SECONDS:.0f} s"
            raise RequestError(message, next_step="send it again", status=408, code="timeout") from error

    async def _read(self, request: Request) -> bytes:
        body, shared = bytearray(), 0
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > _BODY_BYTES:
                    message = f"the body is larger than {_BODY_BYTES} bytes"
                    raise RequestError(message, next_step="send a shorter text", status=413, code="too_large")
                more = max(0, len(body) - _OWN_BYTES) - shared
                shared += more
                self._shared += more
                if self._shared > _SHARED_BYTES:
                    message = f"bodies of more than {_OWN_BYTES} bytes already use all memory for bodies"
                    raise RequestError(message, next_step="try again later", status=429, code="too_many_bodies")
            return bytes(body)
        finally:
            self._shared -= shared
