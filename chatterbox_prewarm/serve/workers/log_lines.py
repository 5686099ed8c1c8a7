"""How log lines look, in front and worker alike: as text for people or JSON for a collector, one line for each record.

What a client sent may be part of a message. Whatever could begin a new line or steer a terminal is escaped, so that
nobody can write lines of a log that the server did not write.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
from typing import Any

FORMATS = ("text", "json")
#: Of the request that is being worked on; a line that is logged meanwhile carries it.
REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

#: C0 and C1 controls, DEL, and Unicode's separators of lines and paragraphs and changes of direction.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_PLAIN = re.compile(r"[^\s\"=\\]+")


def install(log_format: str, *, process: str, level: int | None = None) -> None:
    """Have this process write its log to standard error in `log_format`.

    Args:
        log_format: one of `FORMATS`.
        process: what this process is, as in "front" or "worker cuda:0".
        level: the least that is written; None leaves it as it is.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if log_format == "json" else TextLines(process))
    logging.basicConfig(level=logging.root.level if level is None else level, handlers=[handler], force=True)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record holds besides its message: `extra={"fields": ...}` of the call, and the request it belongs to."""
    fields = dict(getattr(record, "fields", {}))
    request_id = REQUEST_ID.get()
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


class TextLines(logging.Formatter):
    """`time process LEVEL message name=value ...`; a traceback follows on lines of its own, indented."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One record as a line of text."""
        words = [self.formatTime(record), self._process, record.levelname, escape(record.getMessage())]
        words += [f"{name}={_value(value)}" for name, value in fields_of(record).items()]
        lines = [" ".join(words)]
        if record.exc_info and record.exc_info[0] is not None:
            lines += (f"    {escape(line)}" for line in self.formatException(record.exc_info).split("\n"))
        return "\n".join(lines)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, process, message, the fields, and a traceback, if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One record as a line of JSON."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII only, so that no character can end a line


def escape(text: str) -> str:
    """`text` without characters that end a line or steer a terminal; these as Python writes them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) and not _CONTROLS.search(text) else json.dumps(text, ensure_ascii=True)
