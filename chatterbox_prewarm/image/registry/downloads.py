"""Reading a blob from a registry: a cut is gone on from, and the bytes are checked before the last are handed out."""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING

import urllib3.exceptions

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.registry.registry_errors import TransientError
from chatterbox_prewarm.image.registry.transport import pause

if TYPE_CHECKING:
    import requests
    from typing_extensions import Buffer

    from chatterbox_prewarm.image.oci import Descriptor
    from chatterbox_prewarm.image.registry.transport import Transport

#: Bytes that are read at once. A cut that comes sooner than this after another is one of the same failure.
_BLOCK = 1 << 20


class BlobReader(io.RawIOBase):
    """A blob as a stream.

    The last bytes are handed out only when all of them are those that the descriptor says: who has read `size` bytes
    has read the right ones, whether or not they look for the end.

    Args:
        transport: to the registry.
        url: of the blob.
        scope: of a token.
        descriptor: what is expected.
        what: the blob, for messages.
    """

    def __init__(self, transport: Transport, url: str, *, scope: str, descriptor: Descriptor, what: str) -> None:
        self._transport = transport
        self._url = url
        self._scope = scope
        self._descriptor = descriptor
        self._what = what
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._failures = 0
        self._failed_at = 0
        self._response: requests.Response | None = None
        self._response = self._open(attempts=None)
        if descriptor.size == 0:
            self._check()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Read up to a megabyte.

        Raises:
            EngineError: it was cut off too often, or the bytes are not those that the descriptor says.
        """
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._descriptor.size - self._position, _BLOCK)
        if wanted == 0:
            return 0
        block = self._read(wanted)
        self._sha256.update(block)
        self._position += len(block)
        self._transport.counters.bytes_received += len(block)
        if self._position == self._descriptor.size:
            self._check()
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        """Close the connection, which cannot be used again before its answer was read to the end."""
        if self._response is not None:
            self._response.close()
        super().close()

    def _read(self, wanted: int) -> bytes:
        while True:
            try:
                if self._response is None:
                    self._response = self._open(attempts=1)
                block: bytes = self._response.raw.read(wanted)
                if not block:
                    raise urllib3.exceptions.ProtocolError("the answer ended too soon")
            except (urllib3.exceptions.HTTPError, OSError) as error:
                self._fail(self._transport.failure(error, self._url))
            except TransientError as error:
                self._fail(error)
            else:
                return block

    def _fail(self, found: EngineError) -> None:
        """A cut: wait, and let the next read open it anew, unless it was cut too often."""
        if self._response is not None:
            self._response.close()
            self._response = None
        if self._position - self._failed_at >= _BLOCK:
            self._failures = 0
        self._failed_at = self._position
        waits = self._transport.waits
        if self._failures >= len(waits) or not isinstance(found, TransientError):
            raise EngineError(
                f"{self._what} was cut off after {self._position} of {self._descriptor.size} bytes, "
                f"{self._failures + 1} times: {found.message}",
                next_step=found.next_step,
            ) from found
        pause(found, waits[self._failures])
        self._failures += 1

    def _open(self, *, attempts: int | None) -> requests.Response:
        """Open the blob at the position reached."""
        start = self._position
        response = self._transport.stream(
            self._url,
            what=self._what,
            scope=self._scope,
            expect={200, 206} if start else {200},
            headers={"Range": f"bytes={start}-"} if start else {},
            attempts=attempts,
        )
        try:
            self._check_head(response, start)
            if start and response.status_code == 200:  # whoever answers knows no ranges
                self._skip(response, start)
        except BaseException:
            response.close()
            raise
        return response

    def _check_head(self, response: requests.Response, start: int) -> None:
        ranged = response.headers.get("Content-Range", "")
        if response.status_code == 206 and not re.match(rf"bytes {start}-", ranged):
            raise EngineError(
                f"{self._what}: asked for from byte {start} on, the registry {self._transport.host} sends {ranged!r}",
                next_step="try again, or see the proxies before the registry",
            )
        expected = self._descriptor.size - (start if response.status_code == 206 else 0)
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != expected and not response.headers.get("Content-Encoding"):
            raise self._differs(f"{int(length)} bytes of it are sent where {expected} belong")

    def _skip(self, response: requests.Response, count: int) -> None:
        try:
            while count:
                block = response.raw.read(min(count, _BLOCK))
                if not block:
                    raise urllib3.exceptions.ProtocolError("the answer ended too soon")
                count -= len(block)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._transport.failure(error, self._url) from error

    def _check(self) -> None:
        found = f"sha256:{self._sha256.hexdigest()}"
        if found != self._descriptor.digest:
            raise self._differs(f"its bytes have the digest {found}")

    def _differs(self, how: str) -> EngineError:
        return EngineError(
            f"{self._what} is not what the registry {self._transport.host} should have: {how}",
            next_step="push the image again; its copy in the registry, or a cache before it, is damaged",
        )
