"""Progress of long steps, such as "12 of 40 MB".

The command line shows it. A child process sends its progress and its log to its parent, as records on standard error.
All other lines there come from packages and compilers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    #: Takes the arguments of `detail`: the text, whether it passes, and the share of the work that is done.
    Show = Callable[[str, bool, float | None], None]

logger = logging.getLogger(__name__)

#: Starts a line of standard error that is a record. It is the record separator of RFC 7464.
_RECORD = "\x1e"
#: Seconds between two details of a transfer.
_SECONDS = 0.2

_show: Show | None = None


def show_details(show: Show | None) -> None:
    """Set the function that gets the arguments of `detail`; None writes the details to the log."""
    global _show  # noqa: PLW0603 - one for each process, like the handlers of the log
    _show = show


def detail(text: str, *, passing: bool = False, share: float | None = None) -> None:
    """Report the progress of the current step.

    Args:
        text: one line.
        passing: the line is outdated after a second, so it is not written to the log.
        share: the part of the step that is done, from 0 to 1; None if it is unknown.
    """
    if _show is not None:
        _show(text, passing, share)
    elif not passing:
        logger.info("%s", text)


@contextlib.contextmanager
def counted(opened: AbstractContextManager[BinaryIO], size: int) -> Iterator[BinaryIO]:
    """Open a stream of `size` bytes that reports how much of it was read."""
    with opened as stream:
        yield cast("BinaryIO", _CountedStream(stream, size))


class _CountedStream:
    """A stream that counts the bytes that were read."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._read = 0
        self._next = time.monotonic() + _SECONDS

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._read += len(data)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS
            share = self._read / self._size if self._size else None
            detail(f"{self._read / 1e6:.0f} of {self._size / 1e6:.0f} MB", passing=True, share=share)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def send_records() -> None:
    """Send the details and the log of this process to its parent."""
    show_details(lambda text, passing, share: _send({"detail": text, "passing": passing, "share": share}))
    logging.basicConfig(handlers=[_RecordHandler()], force=True)


class _RecordHandler(logging.Handler):
    """Sends the records of the log to the parent."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        message = logging.Formatter().format(record)  # with the traceback, if there is one
        _send({"logger": record.name, "level": record.levelno, "message": message})


def _send(record: dict[str, Any]) -> None:
    # One write for each line, because other processes may write to the same pipe.
    os.write(2, f"{_RECORD}{json.dumps(record)}\n".encode())


def receive_record(line: str) -> bool:
    """Handle one line of a child's standard error; return False if it is not a record."""
    if not line.startswith(_RECORD):
        return False
    try:
        record = json.loads(line[len(_RECORD) :])
        if "detail" in record:
            share = record["share"]
            detail(
                str(record["detail"]), passing=bool(record["passing"]), share=None if share is None else float(share)
            )
        else:
            logging.getLogger(str(record["logger"])).log(int(record["level"]), "%s", record["message"])
    except (ValueError, LookupError, TypeError):
        return False
    return True
