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


async def read_body(request: Request) -> bytes:
    """Read a request body of limited size within a limited time.

    Raises:
        RequestError: the body is compressed (status 415), too large (status 413) or too slow (status 408).
    """
    check_encoding(request.headers)

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _BODY_BYTES:
                message = f"the body is larger than {_BODY_BYTES} bytes"
                raise RequestError(message, next_step="send a shorter text", status=413, code="too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), _BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError) as error:
        message = f"the body did not arrive within {_BODY_SECONDS:.0f} s"
        raise RequestError(message, next_step="send it again", status=408, code="timeout") from error
