"""Upload a blob with one request, or in pieces if that fails: if its connection breaks, or a proxy limits its size.

In OCI's distribution specification, POST starts an upload, PATCH sends a piece, GET asks how many bytes arrived, PUT
ends the upload with the digest, and DELETE cancels it. PUT may contain the whole blob, and POST may take the blob from
another repository of the registry. Each response has the URL of the next request.

Every registry supports the single request, and it is the fastest. Google's Artifact Registry refuses PATCH. After a
broken connection, pieces resume from the registry's position.
"""

from __future__ import annotations

import logging
import re
import urllib.parse
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from chatterbox_prewarm.errors import EngineError, PrewarmError
from chatterbox_prewarm.image.registry.registry_errors import TransientError, resolve_location
from chatterbox_prewarm.image.registry.request_body import FILE_CHANGED, StreamBody, skip
from chatterbox_prewarm.image.registry.retry import retry_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.image.oci import Descriptor, OpenStream
    from chatterbox_prewarm.image.registry.transport import Request, Response, Transport

logger = logging.getLogger(__name__)

#: Bytes of a piece. If that is too large, the smaller size: GitHub accepts at most 4 MiB, others at least 5 MiB.
PIECE, _SMALL_PIECE = 16 << 20, 4 << 20
#: Seconds. A registry may copy the whole blob before it answers PUT. A cancellation must not delay the error.
_FINISH_TIMEOUT, _CANCEL_TIMEOUT = 600.0, 5.0
#: Statuses with which registries refuse PATCH. 404 may also mean that the upload is unknown.
_PATCH_REFUSED = {400, 404, 405, 415, 501}


@dataclass(kw_only=True)
class Upload:
    """The upload of one blob.

    Attributes:
        transport: sends the requests.
        start: the POST request that starts an upload.
        descriptor: describes the blob.
        open_stream: opens the blob at its first byte; called for each attempt.
        is_stored: asks the registry whether it has the blob.
        piece: bytes per request of an upload in pieces.
    """

    transport: Transport
    start: Request
    descriptor: Descriptor
    open_stream: OpenStream
    is_stored: Callable[[], bool]
    piece: int = PIECE
    #: The next attempt sends pieces instead of the whole blob.
    _in_pieces: bool = field(default=False, init=False)
    #: The registry refuses pieces.
    _only_whole: bool = field(default=False, init=False)
    #: Ask the registry whether another of its repositories has the blob.
    _may_mount: bool = field(default=True, init=False)
    #: URL of the next request; empty if no upload is in progress.
    _location: str = field(default="", init=False)
    #: Bytes that the registry has.
    _position: int = field(default=0, init=False)
    #: End of the piece that is being sent.
    _piece_end: int = field(default=0, init=False)
    #: A request got no response, so the registry may have up to `_piece_end` bytes.
    _uncertain: bool = field(default=False, init=False)
    #: The registry reported its position after a broken connection.
    _resumed: bool = field(default=False, init=False)
    #: The highest position so far; a restart does not reset it.
    _furthest: int = field(default=0, init=False)

    def run(self) -> None:
        """Upload the blob. Cancel the upload at the registry if it fails or is interrupted.

        Raises:
            EngineError: the registry cannot be reached or refuses, or the bytes differ from the descriptor.
        """
        wait_before_retry = retry_policy(
            self.transport.retry_delays, f"uploading {self.start.subject} ({self.descriptor.size} bytes)"
        )
        is_retry = False
        try:
            while True:
                try:
                    return self._attempt(is_retry=is_retry)
                except TransientError as error:
                    wait_before_retry(error, self._furthest)
                    is_retry = True
        except BaseException:
            self._cancel()
            raise

    def _attempt(self, *, is_retry: bool) -> None:
        if self._location and self._uncertain:
            self._ask_position()
        if not self._location:
            if is_retry and self.is_stored():
                return  # only the response to the last request was lost
            response = self._begin()
            if response.status == 201:
                return  # mounted
        if not self._in_pieces:
            self._send_whole()
        else:
            if self._position < self.descriptor.size:
                with self.open_stream() as stream:
                    skip(stream, self._position)
                    while self._position < self.descriptor.size:
                        self._send_piece(stream)
            self._finish(b"")
        self.transport.counters["blobs_sent"] += 1

    def _begin(self) -> Response:
        """Start an upload. The status is 201 if the registry took the blob from another repository instead."""
        response = self._mount() or self.transport.send(self.start)
        if response.status == 201:
            return response
        self._position, self._uncertain, self._resumed = 0, False, False
        self._follow(response)
        minimum = response.headers.get("OCI-Chunk-Min-Length", "")
        if minimum.isdecimal():
            self.piece = max(self.piece, int(minimum))
        return response

    def _mount(self) -> Response | None:
        """Ask the registry to take the blob from any of its repositories. Older registries start an upload instead."""
        if not self._may_mount:
            return None
        self._may_mount = False
        url = f"{self.start.url}?mount={urllib.parse.quote(self.descriptor.digest, safe='')}"
        try:
            return self._request("POST", url, expect={201, 202})
        except EngineError as error:  # Quay requires the name of the other repository
            logger.info("%s; uploading it", error.message)
            return None

    def _send_whole(self) -> None:
        """Send the blob with one request. If that fails, the next attempt sends pieces, if the registry allows them."""
        try:
            with self.open_stream() as stream:
                self._finish(self._body(stream, self.descriptor.size))
        except TransientError:
            self._in_pieces = not self._only_whole
            self._restart()
            raise

    def _body(self, stream: BinaryIO, length: int) -> StreamBody:
        return StreamBody(stream=stream, length=length, subject=self.start.subject, counters=self.transport.counters)

    def _send_piece(self, stream: BinaryIO) -> None:
        start, length = self._position, min(self.piece, self.descriptor.size - self._position)
        self._uncertain, self._piece_end = True, start + length
        response = self._request(
            "PATCH",
            self._location,
            expect={201, 202, 413, 416, *_PATCH_REFUSED},
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{start}-{start + length - 1}",
            },
            body=self._body(stream, length),
        )
        if response.status in _PATCH_REFUSED:
            self._send_whole_next(response)
        if response.status in {413, 416}:
            self._use_smaller_pieces(response)
        self._follow(response)
        # Do not read the Range header: Amazon's registry repeats the end of the first piece in it.
        self._position = start + length
        self._furthest = max(self._furthest, self._position)
        self._uncertain = False

    def _send_whole_next(self, response: Response) -> NoReturn:
        """Send the whole blob in the next attempt, because the registry refuses the first piece."""
        error = self.transport.error_for("PATCH", self.start.subject, response)
        if self._position or self._only_whole:
            raise error
        self._only_whole, self._in_pieces = True, False
        self._restart()
        raise TransientError(f"{error.message}; sending it with one request", next_step=error.next_step)

    def _use_smaller_pieces(self, response: Response) -> None:
        error = self.transport.error_for("PATCH", self.start.subject, response)
        if self.piece > _SMALL_PIECE:
            self.piece = _SMALL_PIECE
            raise TransientError(f"{error.message}; continuing with smaller requests", next_step=error.next_step)
        if response.status == 413:
            raise error
        self._restart()  # 416: the registry is at another position than it reported
        raise TransientError(error.message, next_step=error.next_step)

    def _ask_position(self) -> None:
        """Ask the registry for its position. Start again if it cannot answer, or if the position is impossible."""
        low, high = self._position, self._piece_end
        try:
            response = self._request("GET", self._location, expect={200, 202, 204})
        except TransientError:
            raise
        except EngineError as error:
            problem = error.message
        else:
            end = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
            # Registries answer "0-0" for an empty upload and for one byte.
            position = int(end[1]) + 1 if end and int(end[1]) else 0
            if low <= position <= high:
                self._follow(response)
                self._position, self._uncertain, self._resumed = position, False, True
                self._furthest = max(self._furthest, position)
                return
            problem = f"the registry has {position} bytes instead of {low} to {high}"
        logger.warning("%s; uploading %s again", problem, self.start.subject)
        self._restart()

    def _finish(self, body: bytes | StreamBody) -> None:
        """End the upload with the rest of the blob."""
        separator = "&" if "?" in self._location else "?"
        url = f"{self._location}{separator}digest={urllib.parse.quote(self.descriptor.digest, safe='')}"
        self._uncertain = True
        response = self._request(
            "PUT",
            url,
            expect={201, 204, 400, 404, 413, 416},
            headers={"Content-Type": "application/octet-stream"},
            body=body,
            timeout=_FINISH_TIMEOUT,
        )
        if response.status in {201, 204}:
            self._location = ""
            return
        error = self.transport.error_for("PUT", self.start.subject, response)
        if response.status == 413 and not self._in_pieces and not self._only_whole:
            raise TransientError(f"{error.message}; continuing with smaller requests", next_step=error.next_step)
        if self._resumed:  # bytes of the broken connection may have arrived after the registry reported its position
            self._restart()
            raise TransientError(f"{error.message}; uploading it again", next_step=error.next_step)
        if b"DIGEST_INVALID" in response.body:
            raise EngineError(
                f"{error.message}; the uploaded bytes do not have the digest {self.descriptor.digest}",
                next_step=FILE_CHANGED,
            )
        raise error

    def _request(self, method: str, url: str, **options: Any) -> Response:
        return self.transport.send(replace(self.start, method=method, url=url, **options))

    def _follow(self, response: Response) -> None:
        """Take the URL of the next request. A response without one keeps the last URL."""
        location = response.headers.get("Location", "") or self._location
        if not location:
            raise EngineError(
                f"the registry {self.transport.host} does not say where to upload {self.start.subject}",
                next_step="see the configuration of the registry and of the proxies in front of it",
            )
        self._location = resolve_location(response.url, location)

    def _restart(self) -> None:
        self._cancel()
        self._location = ""
        self._position = 0

    def _cancel(self) -> None:
        if self._location:
            cancel(self.transport, self._location, self.start)


def cancel(transport: Transport, location: str, start: Request) -> None:
    """Cancel an upload that `start` began. If that fails, the registry removes the upload itself after some days.

    Docker's registry (version 2) refuses it after an incomplete request.
    """
    request = replace(start, method="DELETE", url=location, expect={200, 202, 204}, body=None, timeout=_CANCEL_TIMEOUT)
    try:
        transport.send(request)
    except PrewarmError as error:
        logger.info("the upload of %s was not cancelled at the registry: %s", start.subject, error.message)
