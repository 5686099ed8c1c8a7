"""What a request to a registry that failed means, in words; and whether it may pass by itself.

A message has no query of an address: those of uploads and of storage behind a redirect are as good as a password.
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

#: Seconds that a registry may ask to wait before a further attempt.
MAX_WAIT = 60.0
#: Statuses of what may pass by itself.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Characters of a registry's own words in a message.
_MAX_SAID = 400


class TransientError(EngineError):
    """What may pass by itself: a broken connection, a registry that is busy. Raised once the attempts are used up.

    Attributes:
        wait: seconds that the registry asks to wait, or 0.
    """

    def __init__(self, message: str, *, next_step: str, wait: float = 0.0) -> None:
        super().__init__(message, next_step=next_step)
        self.wait = wait


def refusal(host: str, problem: str, status: int, headers: Mapping[str, str], body: bytes) -> EngineError:
    """What an answer that is not the one hoped for means; a refused login is not for here.

    Args:
        host: of the registry.
        problem: who answered what to whom, which the message begins with.
        status: of HTTP.
        headers: of the answer.
        body: of the answer.
    """
    said = words_of(body)
    message = problem + (f": {said}" if said else "")
    if status == 404:
        return EngineError(message, next_step=f"check the reference; push it first if {host} should have it")
    if status == 413:
        return EngineError(
            f"{message}; the registry, or a proxy before it, limits the size of a request",
            next_step="raise that limit (nginx: client_max_body_size), or push past the proxy",
        )
    if status == 507 or _is_full(body):
        return EngineError(f"{message}; its disk is full", next_step=f"free some space on the registry {host}")
    if status in PASSING:
        wait = _retry_after(headers.get("Retry-After", ""))
        if wait > MAX_WAIT:
            return EngineError(
                f"{message}; it asks to wait {wait:.0f} s", next_step="try again then, or log in if you did not"
            )
        return TransientError(message, next_step="try again later; see the registry's log", wait=wait)
    return EngineError(message, next_step="see the registry's log, and whether it takes OCI images")


def broken(error: Exception, url: str, *, host: str, reached: bool) -> EngineError:
    """What a request that got no answer, or only a part of one, means.

    Args:
        error: of the libraries below.
        url: that was asked.
        host: of the registry.
        reached: whether it answered before. If not, the address is wrong or the registry is down, which no further
            attempt mends; if so, it starts anew perhaps, which passes.
    """
    chain = tuple(_causes(error))
    place = origin(url)
    unreached = ""
    for cause in chain:
        if isinstance(cause, (ssl.SSLError, urllib3.exceptions.SSLError, requests.exceptions.SSLError)):
            if reached and not any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
                break  # a connection that stood was cut
            return _untrusted(chain, place, host)
        if isinstance(cause, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
            return EngineError(f"{shown(url)} is no address to send to", next_step="see the registry's configuration")
        if isinstance(cause, urllib3.exceptions.NameResolutionError):
            unreached = f"the name in {place} cannot be resolved"
        elif isinstance(cause, urllib3.exceptions.ProxyError):
            unreached = f"the proxy on the way to {place} does not let us through"
        elif isinstance(cause, urllib3.exceptions.NewConnectionError):  # of the kind of the next, for old callers
            unreached = f"nothing answers at {place}: {_words(chain)}"
        elif isinstance(cause, urllib3.exceptions.ConnectTimeoutError):
            unreached = f"{place} did not answer in time"
        if unreached:
            message = f"the registry {host} cannot be reached: {unreached}"
            step = f"check the reference and the network, and start the registry at {host}"
            return TransientError(message, next_step=step) if reached else EngineError(message, next_step=step)
    return TransientError(
        f"the connection to the registry {host} broke at {shown(url)}: {_words(chain)}",
        next_step="try again; if it happens at the same place, see the limits of the proxies before the registry",
    )


def origin(url: str) -> str:
    """The scheme and host of an address, with the port where it is not the scheme's own."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2].lower()
    return f"{parts.scheme}://{host.removesuffix(':443' if parts.scheme == 'https' else ':80')}"


def resolve(base: str, location: str) -> str:
    """The address that a Location header leads to.

    Raises:
        EngineError: it leads nowhere.
    """
    try:
        found = urllib.parse.urljoin(base, location)
        parts = urllib.parse.urlsplit(found)
        if parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port):
            return found
    except ValueError:  # what stands for the host or the port is none
        pass
    raise EngineError(
        f"{origin(base)} leads to an address that is none: {location.partition('?')[0][:200]!r}",
        next_step="see the registry's configuration, and the proxies before it",
    )


def shown(url: str) -> str:
    """An address without its query, which may be a secret."""
    return origin(url) + urllib.parse.urlsplit(url).path


def _untrusted(chain: Sequence[BaseException], place: str, host: str) -> EngineError:
    words = _words(chain)
    step = "name the file of your authority's certificate in REQUESTS_CA_BUNDLE"
    if re.search("wrong.version.number|record.layer|http.request", f"{words} {chain}", re.IGNORECASE):
        step = "it seems to speak plain HTTP: say that it is insecure, if nobody else is on that network"
    return EngineError(f"the registry {host} speaks no TLS that can be trusted, at {place}: {words}", next_step=step)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what lies under it: each library in between puts it into one of its own, in its own way."""
    found: list[BaseException] = []
    pending = [error]
    while pending:
        current = pending.pop(0)
        if any(current is known for known in found):
            continue
        found.append(current)
        yield current
        inner = (getattr(current, "reason", None), *current.args, current.__cause__, current.__context__)
        pending.extend(cause for cause in inner if isinstance(cause, BaseException))


def _words(chain: Sequence[BaseException]) -> str:
    """What the system said; the libraries' own words have whole addresses in them."""
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, OSError) and not isinstance(cause, requests.RequestException) and cause.strerror:
            return cause.strerror
    for cause in chain:
        if isinstance(cause, (TimeoutError, urllib3.exceptions.TimeoutError)):
            return "it did not answer in time"
    return type(chain[-1]).__name__


def words_of(body: bytes) -> str:
    """A registry's own words of an error, on one line and without what a terminal would obey."""
    try:
        errors = json.loads(body)["errors"]
        said = "; ".join(
            " ".join(str(error.get(key) or "") for key in ("code", "message", "detail")) for error in errors
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = body[:_MAX_SAID].decode(errors="replace")
        said = re.sub(r"<[^>]*>", " ", said)  # a proxy's page
    said = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", said).strip()
    return said if len(said) <= _MAX_SAID else f"{said[:_MAX_SAID]}…"


def _is_full(body: bytes) -> bool:
    """Whether a registry ran out of space: Docker's has the system's words, or in a detail its number, ENOSPC."""
    return b"no space left" in body.lower() or bool(re.search(rb'"Err":\s*28\b', body))


def _retry_after(header: str) -> float:
    """Seconds of a Retry-After header, which has seconds or a date; 0 where there is none that can be read."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if header.strip().isdecimal():
            return float(header)
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    return 0.0
