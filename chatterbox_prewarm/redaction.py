"""Hide secrets in messages, log lines and tracebacks: passwords in URLs, tokens, and the query of signed URLs."""

from __future__ import annotations

import logging
import re
import sys
import traceback

HIDDEN = "***"

_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ in a URL, also with an @ in the password.
    (re.compile(r"(?<=://)[^\s/'\"]*@"), f"{HIDDEN}@"),
    # The same without a scheme. `name:tag@sha256:…` is the digest of an image.
    (re.compile(r"\b[\w.+-]+:[^\s/@'\"]+@(?!sha\d+:)(?=[\w.-]+)"), f"{HIDDEN}@"),
    # A query can be a signature, as in the redirects of registries and of model hubs.
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")>]+"), rf"\1?{HIDDEN}"),
    # Headers, also in JSON and in Python's notation of dictionaries and bytes.
    (
        re.compile(
            r"(?i)\b((?:proxy-)?authorization|x-registry-auth|cookie)(['\"]?\s*[:=,]\s*(?:b?['\"])?)"
            r"(?:(basic|bearer|token|digest)\s+)?[^\s'\",}]+"
        ),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+(?=[^\s'\"]*[\d=])[A-Za-z0-9._~+/=-]{16,}"), rf"\1 {HIDDEN}"),
    # name=value and "name": "value".
    (
        re.compile(
            r"(?i)\b((?:[\w-]*[_-])?(?:password|passwd|passphrase|secret|token|identitytoken|registrytoken|auth"
            r"|api_?key|access_?key))(['\"]?\s*[=:]\s*(?:b?['\"])?)(?!\*\*\*)[^\s'\",;&}]+"
        ),
        rf"\1\2{HIDDEN}",
    ),
    # Tokens of Hugging Face, GitHub and Amazon, and JSON web tokens.
    (re.compile(r"\b(?:hf_|gh[opsru]_|github_pat_|AKIA)[A-Za-z0-9_]{16,}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), HIDDEN),
)


def redact(text: str) -> str:
    """Return `text` with every secret that can be recognized replaced by `***`."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def print_traceback() -> None:
    """Print the traceback of the present exception on standard error."""
    sys.stderr.write(redact(traceback.format_exc()))


class RedactedFormatter(logging.Formatter):
    """A formatter of log records that hides secrets, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return redact(super().format(record))
