"""An h11 connection that refuses requests which a proxy in front of the server may read differently.

If two programs disagree on where a request ends, a client can hide a second request in the body of the first one. The
proxy does not check the hidden request, and the next client of the same connection gets its response. This is called
request smuggling. h11 accepts some old forms of HTTP with more than one reading. RFC 9112 allows a server to refuse all
of them: two lengths (section 6.3), line feeds without a carriage return (2.2), and folded headers (5.2).
"""

from __future__ import annotations

import re
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer

_NEXT_STEP = "send HTTP/1.1 as in RFC 9112, or correct the proxy in front of this server"
_TWO_LENGTHS = f"the request has both Content-Length and Transfer-Encoding: {_NEXT_STEP}"
_OLD_CHUNKED = f"the request has Transfer-Encoding, but its version is older than HTTP/1.1: {_NEXT_STEP}"
_BARE_LINE_END = f"a line of the request does not end with CR LF: {_NEXT_STEP}"
_FOLDED = f"a header of the request continues on a second line: {_NEXT_STEP}"
_LONG_HEAD = "the head of the request is longer than 16 KiB: send shorter headers and cookies"
#: The reasons that are safe to show. Those of h11 contain data of the request.
_REASONS = frozenset({_TWO_LENGTHS, _OLD_CHUNKED, _BARE_LINE_END, _FOLDED, _LONG_HEAD})

_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)")
_FOLD = re.compile(rb"(?:^|\n)[ \t]")


class StrictConnection(h11.Connection):
    """The server's side of a connection.

    Attributes:
        refusal: why the last request was refused; empty if h11 refused it, or if it was not refused.
        sent_bytes: the size of all data that was given to the transport.
    """

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        # h11 has no option for this. A test fails if h11 stops using this attribute.
        self._receive_buffer = _StrictBuffer(max_incomplete_event_size)
        self.refusal = ""
        self.sent_bytes = 0

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """Return the data for an event in pieces, as h11 does. All other methods that send call this one."""
        pieces = super().send_with_data_passthrough(event)
        self.sent_bytes += sum(map(len, pieces or ()))
        return pieces

    def next_event(self) -> Any:
        """Return the next event, as h11 does.

        Raises:
            h11.RemoteProtocolError: the request is invalid or ambiguous.
        """
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_framing(event)
        except h11.RemoteProtocolError as error:
            reason = str(error)
            is_long = error.error_status_hint == 431  # an incomplete head, which h11 refuses itself
            self.refusal = _LONG_HEAD if is_long else reason if reason in _REASONS else ""
            raise
        return event


class _StrictBuffer(ReceiveBuffer):
    """A buffer whose lines all end with CR LF. h11 reads heads, trailers and the headers of chunks as lines.

    Args:
        max_head: the size of the longest head. h11 checks only heads that are still incomplete.
    """

    def __init__(self, max_head: int) -> None:
        super().__init__()
        self._max_head = max_head

    def maybe_extract_lines(self) -> list[bytearray] | None:
        before = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is not None:
            extracted = before[: len(before) - len(self)]
            if len(extracted) > self._max_head:
                raise h11.LocalProtocolError(_LONG_HEAD)
            _check_line_ends(extracted)
            if _FOLD.search(extracted):
                raise h11.LocalProtocolError(_FOLDED)
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        line = super().maybe_extract_next_line()
        if line is not None:
            _check_line_ends(line)
        return line


def _check_line_ends(data: bytes | bytearray) -> None:
    if _BARE.search(data):
        raise h11.LocalProtocolError(_BARE_LINE_END)


def _check_framing(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return
    if b"content-length" in names:
        raise h11.RemoteProtocolError(_TWO_LENGTHS)
    if request.http_version < b"1.1":
        raise h11.RemoteProtocolError(_OLD_CHUNKED)
