"""Turn HTTP statuses and network exceptions into errors with a next step, and decide which of them are transient.

Messages omit the query of every URL: upload URLs and redirects to storage carry secrets there.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import re
import ssl
import time
import urllib.parse
from typing import TYPE_CHECKING

import requests
import urllib3.exceptions

from chatterbox_prewarm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: The longest Retry-After, in seconds, that is waited for.
MAX_RETRY_AFTER = 60.0
#: HTTP statuses that are worth a retry.
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Characters of a registry's error text that a message quotes.
_MAX_QUOTE = 400


class TransientError(EngineError):
    """A failure that a retry may fix: a broken connection or a busy registry.

    Attributes:
        retry_after: seconds that the registry asks to wait, or 0.
    """

    def __init__(self, message: str, *, next_step: str, retry_after: float = 0.0) -> None:
        super().__init__(message, next_step=next_step)
        self.retry_after = retry_after


def status_error(host: str, problem: str, status: int, headers: Mapping[str, str], body: bytes) -> EngineError:
    """Return the error for a response with an unexpected HTTP status. The login handles 401 and 403.

    `problem` is the start of the message: the registry, the status and the request.
    """
    quote = quote_error(body)
    message = problem + (f": {quote}" if quote else "")
    if status == 404:
        return EngineError(message, next_step=f"check the reference; push the image first if {host} should have it")
    if status == 413:
        return EngineError(
            f"{message}; the registry, or a proxy in front of it, limits the size of a request",
            next_step="raise that limit (nginx: client_max_body_size), or push without the proxy",
        )
    if status == 507 or _is_disk_full(body):
        return EngineError(f"{message}; its disk is full", next_step=f"free some space on the registry {host}")
    if status in TRANSIENT_STATUSES:
        retry_after = _retry_after(headers.get("Retry-After", ""))
        if retry_after > MAX_RETRY_AFTER:
            return EngineError(
                f"{message}; it asks to wait {retry_after:.0f} s",
                next_step="try again after that time; a login may raise the limit",
            )
        return TransientError(message, next_step="try again later; see the registry's log", retry_after=retry_after)
    return EngineError(message, next_step="see the registry's log, and check that it accepts OCI images")


def network_error(error: Exception, url: str, *, host: str, reached: bool) -> EngineError:
    """Return the error for a request that got no response, or only a part of one.

    Args:
        error: what requests or urllib3 raised.
        url: the URL of the request.
        host: the registry.
        reached: whether the registry has answered before. If it has, it may be restarting, so the error is transient.
            If not, the address is wrong or the registry is down, and a retry does not help.
    """
    chain = tuple(_causes(error))
    server = origin(url)
    problem = ""
    for cause in chain:
        if isinstance(cause, (ssl.SSLError, urllib3.exceptions.SSLError, requests.exceptions.SSLError)):
            if reached and not any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
                break  # an established connection broke
            return _tls_error(chain, server, host)
        if isinstance(cause, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
            return EngineError(f"{without_query(url)} is an invalid URL", next_step="see the registry's configuration")
        if isinstance(cause, urllib3.exceptions.NameResolutionError):
            problem = f"the name in {server} cannot be resolved"
        elif isinstance(cause, urllib3.exceptions.ProxyError):
            problem = f"the proxy refuses the connection to {server}"
        elif isinstance(cause, urllib3.exceptions.NewConnectionError):  # a subclass of ConnectTimeoutError
            problem = f"no server answers at {server}: {_reason(chain)}"
        elif isinstance(cause, urllib3.exceptions.ConnectTimeoutError):
            problem = f"the connection to {server} timed out"
        if problem:
            message = f"the registry {host} cannot be reached: {problem}"
            step = f"check the reference and the network, and start the registry at {host}"
            return TransientError(message, next_step=step) if reached else EngineError(message, next_step=step)
    return TransientError(
        f"the connection to the registry {host} broke at {without_query(url)}: {_reason(chain)}",
        next_step="try again; if it breaks at the same byte, see the limits of the proxies in front of the registry",
    )


def origin(url: str) -> str:
    """Return scheme and host of a URL, with the port only if it is not the default of the scheme."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower()
    return f"{parts.scheme}://{host.removesuffix(':443' if parts.scheme == 'https' else ':80')}"


def resolve_location(base: str, location: str) -> str:
    """Return the absolute URL of a Location header.

    Raises:
        EngineError: the URL is invalid, or not HTTP.
    """
    try:
        url = urllib.parse.urljoin(base, location)
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port):
            return url
    except ValueError:  # the host or the port is malformed
        pass
    raise EngineError(
        f"{origin(base)} redirects to an invalid URL: {location.partition('?')[0][:200]!r}",
        next_step="see the configuration of the registry and of the proxies in front of it",
    )


def without_query(url: str) -> str:
    """Return a URL without its query, which may be secret."""
    return origin(url) + urllib.parse.urlsplit(url).path


def quote_error(body: bytes) -> str:
    """Return the registry's own error text on one line, without control characters that a terminal would obey."""
    try:
        errors = json.loads(body)["errors"]
        text = "; ".join(
            " ".join(str(error.get(key) or "") for key in ("code", "message", "detail")) for error in errors
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = re.sub(r"<[^>]*>", " ", body[:_MAX_QUOTE].decode(errors="replace"))  # an HTML page of a proxy
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}…"


def _tls_error(chain: Sequence[BaseException], server: str, host: str) -> EngineError:
    reason = _reason(chain)
    step = "name the certificate file of your authority in REQUESTS_CA_BUNDLE"
    if re.search("wrong.version.number|record.layer|http.request", f"{reason} {chain}", re.IGNORECASE):
        step = "the server seems to speak plain HTTP: use --insecure if you trust everyone on that network"
    return EngineError(f"the registry {host} has no trusted TLS connection at {server}: {reason}", next_step=step)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all errors that it wraps; requests and urllib3 store them in different attributes."""
    seen: list[BaseException] = []
    pending = [error]
    while pending:
        current = pending.pop(0)
        if any(current is known for known in seen):
            continue
        seen.append(current)
        yield current
        inner = (getattr(current, "reason", None), *current.args, current.__cause__, current.__context__)
        pending.extend(cause for cause in inner if isinstance(cause, BaseException))


def _reason(chain: Sequence[BaseException]) -> str:
    """Return the system's message; the libraries' own messages contain whole URLs."""
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, OSError) and not isinstance(cause, requests.RequestException) and cause.strerror:
            return cause.strerror
    if any(isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError)) for cause in chain):
        return "it timed out"
    return type(chain[-1]).__name__


def _is_disk_full(body: bytes) -> bool:
    """Check for ENOSPC: Docker's registry reports it as the system's message or as its number, 28."""
    return b"no space left" in body.lower() or bool(re.search(rb'"Err":\s*28\b', body))


def _retry_after(header: str) -> float:
    """Return the seconds of a Retry-After header, which holds seconds or a date; 0 if it is missing or malformed."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if header.strip().isdecimal():
            return float(header)
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    return 0.0
