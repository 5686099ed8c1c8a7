"""Sending a blob to a registry: in pieces, and from where the registry stands after a connection broke.

Distribution of the specification: POST begins an upload and answers where; PATCH sends a piece, GET asks how much
arrived, PUT ends it with the digest, DELETE drops it. Every answer has the address of the next request.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import urllib.parse
from typing import TYPE_CHECKING, Any, BinaryIO

from chatterbox_prewarm.errors import EngineError, PrewarmError, from_os_error
from chatterbox_prewarm.image.registry.registry_errors import TransientError, resolve
from chatterbox_prewarm.image.registry.transport import Answer, Body, pause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from chatterbox_prewarm.image.oci import Descriptor
    from chatterbox_prewarm.image.registry.transport import Transport

logger = logging.getLogger(__name__)

#: Bytes of a piece, and of one where that is too much: GitHub's registry takes 4 MiB, some others no less than 5.
PIECE, _SMALL_PIECE = 16 << 20, 4 << 20
#: Bytes in memory at once.
_BLOCK = 1 << 20
#: Seconds: a registry may copy the whole blob to its place before it answers; dropping an upload must not hold us up.
_FINISH_TIMEOUT, _CANCEL_TIMEOUT = 600.0, 5.0


class Upload:
    """One blob on its way.

    Args:
        transport: to the registry.
        url: where uploads to the repository begin.
        scope: of a token.
        descriptor: of the blob.
        opened: opens it from its beginning.
        what: the blob, for messages.
        exists: whether the registry has it.
        piece: bytes of a request.
    """

    def __init__(
        self,
        transport: Transport,
        url: str,
        *,
        scope: str,
        descriptor: Descriptor,
        opened: Callable[[], AbstractContextManager[BinaryIO]],
        what: str,
        exists: Callable[[], bool],
        piece: int = PIECE,
    ) -> None:
        self._transport = transport
        self._url = url
        self._scope = scope
        self._descriptor = descriptor
        self._opened = opened
        self._what = what
        self._exists = exists
        self._piece = piece
        self._location = ""
        self._position = 0
        #: Where the piece under way ends.
        self._ending = 0
        #: The position may be another: a request for it got no answer.
        self._unsure = False
        self._resumed = False
        self._furthest = 0

    def run(self) -> None:
        """Send the blob.

        Raises:
            EngineError: the registry cannot be reached, refuses, or got other bytes than the descriptor says.
        """
        failures = 0
        try:
            while True:
                reached = self._furthest
                try:
                    return self._go_on(again=failures > 0)
                except TransientError as error:
                    failures = 1 if self._furthest > reached else failures + 1
                    if failures > len(self._transport.waits):
                        raise EngineError(
                            f"sending {self._what} failed {failures} times in a row at byte {self._position} of "
                            f"{self._descriptor.size}: {error.message}",
                            next_step=error.next_step,
                        ) from error
                    pause(error, self._transport.waits[failures - 1])
        except BaseException:
            self._cancel()
            raise

    def _go_on(self, *, again: bool) -> None:
        if self._location and self._unsure:
            self._ask_position()
        if not self._location:
            if again and self._exists():
                return  # the answer to the last request was lost, not the request
            self._begin()
        if self._position < self._descriptor.size:
            with self._opened() as stream:
                _skip(stream, self._position)
                while self._position < self._descriptor.size:
                    self._send_piece(stream)
        self._finish()
        self._transport.counters.blobs_sent += 1

    def _begin(self) -> None:
        answer = self._request("POST", self._url, expect={202})
        self._position, self._unsure, self._resumed = 0, False, False
        self._follow(answer)
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        if least.isdecimal():
            self._piece = max(self._piece, int(least))

    def _send_piece(self, stream: BinaryIO) -> None:
        start, length = self._position, min(self._piece, self._descriptor.size - self._position)
        self._unsure, self._ending = True, start + length
        with _interrupt_put_off():
            answer = self._request(
                "PATCH",
                self._location,
                expect={201, 202, 413, 416},
                headers={
                    "Content-Type": "application/octet-stream",
                    "Content-Range": f"{start}-{start + length - 1}",
                },
                body=Body(length, self._blocks(stream, length)),
            )
            if answer.status in {413, 416}:
                self._take_smaller_pieces(answer)
            self._follow(answer)
            # Of all that it got: Amazon's registry goes on to name the end of the first piece in its Range.
            self._position = start + length
            self._furthest = max(self._furthest, self._position)
            self._unsure = False

    def _take_smaller_pieces(self, answer: Answer) -> None:
        refusal = self._transport.refusal("PATCH", self._what, answer)
        if self._piece <= _SMALL_PIECE:
            if answer.status == 416:  # it stands elsewhere than it said
                self._drop()
                raise TransientError(refusal.message, next_step=refusal.next_step)
            raise refusal
        self._piece = _SMALL_PIECE
        raise TransientError(f"{refusal.message}; going on with smaller requests", next_step=refusal.next_step)

    def _ask_position(self) -> None:
        """Where the registry stands; where it cannot say, or says what cannot be, the upload begins anew."""
        low, high = self._position, self._ending
        try:
            answer = self._request("GET", self._location, expect={200, 202, 204})
        except TransientError:
            raise
        except EngineError as error:
            logger.warning("%s; sending %s anew", error.message, self._what)
            self._drop()
            return
        ranged = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
        # "0-0" is said of nothing and of one byte.
        position = int(ranged[1]) + 1 if ranged and int(ranged[1]) else 0
        if not low <= position <= high:
            logger.warning(
                "the registry has %d bytes of %s, of %d to %d; sending it anew", position, self._what, low, high
            )
            self._drop()
            return
        self._follow(answer)
        self._position, self._unsure, self._resumed = position, False, True
        self._furthest = max(self._furthest, position)

    def _finish(self) -> None:
        joint = "&" if "?" in self._location else "?"
        url = f"{self._location}{joint}digest={urllib.parse.quote(self._descriptor.digest, safe='')}"
        self._unsure = True
        answer = self._request("PUT", url, expect={201, 204, 400, 404, 416}, body=b"", timeout=_FINISH_TIMEOUT)
        if answer.status in {201, 204}:
            self._location = ""
            return
        refusal = self._transport.refusal("PUT", self._what, answer)
        if self._resumed:  # what was under way when the connection broke may have come in late
            self._drop()
            raise TransientError(f"{refusal.message}; sending it anew", next_step=refusal.next_step)
        if b"DIGEST_INVALID" in answer.body:
            raise EngineError(
                f"{refusal.message}; what was sent is not {self._descriptor.digest}",
                next_step="the file changed since it was described: make it anew",
            )
        raise refusal

    def _request(self, method: str, url: str, **options: Any) -> Answer:
        return self._transport.request(method, url, what=self._what, scope=self._scope, attempts=1, **options)

    def _follow(self, answer: Answer) -> None:
        """Take the address of the next request; an answer without one leaves the last."""
        location = answer.headers.get("Location", "") or self._location
        if not location:
            raise EngineError(
                f"the registry {self._transport.host} does not say where {self._what} is to go",
                next_step="see the registry's configuration, and the proxies before it",
            )
        self._location = resolve(answer.url, location)

    def _drop(self) -> None:
        self._cancel()
        self._location = ""
        self._position = 0

    def _cancel(self) -> None:
        if self._location:
            cancel(self._transport, self._location, scope=self._scope, what=self._what)

    def _blocks(self, stream: BinaryIO, length: int) -> Iterator[bytes]:
        while length:
            block = _read(stream, min(length, _BLOCK))
            if not block:
                raise EngineError(
                    f"{self._what} ends {length} bytes too soon of {self._descriptor.size} where it is read from",
                    next_step="the file changed since it was described: make it anew",
                )
            length -= len(block)
            self._transport.counters.bytes_sent += len(block)
            yield block


def cancel(transport: Transport, location: str, *, scope: str, what: str) -> None:
    """Let a registry forget an upload; it does by itself after some days, if this fails."""
    try:
        transport.request(
            "DELETE", location, what=what, scope=scope, expect={200, 202, 204}, attempts=1, timeout=_CANCEL_TIMEOUT
        )
    except PrewarmError as error:
        logger.info("the upload of %s is left to the registry: %s", what, error.message)


def _skip(stream: BinaryIO, count: int) -> None:
    if count and stream.seekable():
        stream.seek(count)
        return
    while count:
        block = _read(stream, min(count, _BLOCK))
        if not block:
            return  # too short: said when the piece is sent
        count -= len(block)


def _read(stream: BinaryIO, count: int) -> bytes:
    """Read from what is sent; an error of it must not be taken for one of the connection."""
    try:
        return stream.read(count)
    except OSError as error:
        raise from_os_error(error, "reading what is to be pushed") from error


@contextlib.contextmanager
def _interrupt_put_off() -> Iterator[None]:
    """Put the first Ctrl-C off to the end of the block, at most a piece; a second one comes through.

    A registry that got a part of a piece may stand elsewhere than the address it gave says. Docker's, at version 2,
    then refuses to drop the upload.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []

    def note(number: int, _: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        logger.warning("interrupted: the piece under way goes to its end, so that the registry can drop the upload")
        logger.warning("interrupt once more to leave at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
