"""Download a blob: resume after a broken connection, and verify the bytes before the last of them are returned."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.registry.registry_errors import TransientError
from chatterbox_prewarm.image.registry.retry import retry_policy

if TYPE_CHECKING:
    from collections.abc import Generator

    import requests

    from chatterbox_prewarm.image.oci import Descriptor
    from chatterbox_prewarm.image.registry.transport import Request, Transport

_CHUNK = 1 << 20


def download(transport: Transport, request: Request, descriptor: Descriptor) -> Generator[bytes]:
    """Yield the bytes of a blob in chunks of at most 1 MiB.

    The last chunk is only yielded after the digest of all bytes is verified, so a reader that reads exactly
    `descriptor.size` bytes has the right ones.

    Raises:
        EngineError: the download broke too often, or the bytes differ from the descriptor.
    """
    wait_before_retry = retry_policy(
        transport.retry_delays, f"downloading {request.subject} ({descriptor.size} bytes)", min_progress=_CHUNK
    )
    sha256, position, verified = hashlib.sha256(), 0, False
    response: requests.Response | None = None
    try:
        while not verified:
            try:
                if response is None:
                    response = transport.open_stream(_resume(request, position))
                    _prepare(transport, response, request.subject, descriptor, position)
                chunk = _read(transport, response, descriptor.size - position)
            except TransientError as error:
                if response is not None:
                    response.close()
                    response = None
                wait_before_retry(error, position)
                continue
            sha256.update(chunk)
            position += len(chunk)
            transport.counters["bytes_received"] += len(chunk)
            if position == descriptor.size:
                digest = f"sha256:{sha256.hexdigest()}"
                if digest != descriptor.digest:
                    raise _damaged(transport, request.subject, f"its bytes have the digest {digest}")
                verified = True
            yield chunk
    finally:
        if response is not None:
            # The connection is not reusable unless its response was read to the end.
            response.close()


def _resume(request: Request, position: int) -> Request:
    """Return the request for the bytes from `position` on. A registry without ranges answers with status 200."""
    if not position:
        return request
    return replace(request, expect={200, 206}, headers={**request.headers, "Range": f"bytes={position}-"})


def _prepare(
    transport: Transport, response: requests.Response, subject: str, descriptor: Descriptor, position: int
) -> None:
    """Check the headers of a response, and skip to `position` if the registry sent the blob from the start."""
    partial = response.status_code == 206
    content_range = response.headers.get("Content-Range", "")
    if partial and not content_range.startswith(f"bytes {position}-"):
        raise EngineError(
            f"the registry {transport.host} sent the range {content_range!r} of {subject}, "
            f"not the bytes from {position} on",
            next_step="try again, or see the proxies in front of the registry",
        )
    expected = descriptor.size - (position if partial else 0)
    length = response.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) != expected and not response.headers.get("Content-Encoding"):
        raise _damaged(transport, subject, f"the registry sends {int(length)} bytes instead of {expected}")
    skip = 0 if partial else position
    while skip:
        skip -= len(_read(transport, response, skip))


def _read(transport: Transport, response: requests.Response, remaining: int) -> bytes:
    """Read the next chunk; it is only empty if nothing remains."""
    chunk = transport.read(response, min(remaining, _CHUNK))
    if remaining and not chunk:
        raise TransientError("the response ended too early", next_step="try again")
    return chunk


def _damaged(transport: Transport, subject: str, problem: str) -> EngineError:
    return EngineError(
        f"{subject} is damaged at the registry {transport.host}: {problem}",
        next_step="push the image again; the copy in the registry, or in a cache in front of it, is damaged",
    )
