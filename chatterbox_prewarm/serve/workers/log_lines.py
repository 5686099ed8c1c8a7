"""Log formats of the front and the workers: text for people or JSON for a log collector, one line for each record.

A message may contain text from a client. Characters that start a new line or control a terminal are escaped, so that a
client cannot forge log lines.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
from typing import Any

from chatterbox_prewarm.redaction import redact

FORMATS = ("text", "json")
#: Id of the current request. Each log line of the request contains it.
REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)

#: C0 and C1 controls, DEL, and Unicode's line and paragraph separators and direction marks.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_PLAIN = re.compile(r"[^\s\"=\\]+")


def install(log_format: str, *, process: str, level: int) -> None:
    """Make this process write its log to standard error.

    Args:
        log_format: one of `FORMATS`.
        process: name of this process, such as "front" or "worker cuda:0".
        level: lowest level that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if log_format == "json" else TextLines(process))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields of a record: `extra={"fields": ...}` of the logging call, and the id of the current request."""
    fields = dict(getattr(record, "fields", {}))
    request_id = REQUEST_ID.get()
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


class TextLines(logging.Formatter):
    """Format a record as `time process LEVEL message name=value ...`. A traceback follows on indented lines."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as text."""
        words = [self.formatTime(record), self._process, record.levelname, escape(record.getMessage())]
        words += [f"{name}={_value(value)}" for name, value in fields_of(record).items()]
        lines = [" ".join(words)]
        if record.exc_info and record.exc_info[0] is not None:
            lines += (f"    {escape(line)}" for line in self.formatException(record.exc_info).split("\n"))
        return redact("\n".join(lines))


class JsonLines(TextLines):
    """Format a record as a JSON object: time (ISO 8601, UTC), level, process, message, fields, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as JSON."""
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
        hidden = {name: redact(value) if isinstance(value, str) else value for name, value in line.items()}
        return json.dumps(hidden, default=str)  # ASCII only, so no character can end the line


def escape(text: str) -> str:
    """Replace characters that end a line or control a terminal by Python's escape sequences."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) and not _CONTROLS.search(text) else json.dumps(text, ensure_ascii=True)
