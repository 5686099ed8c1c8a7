"""HTTP requests to one registry: login, redirects and error messages. Every request is sent once; see `retry`."""

from __future__ import annotations

import logging
import os
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import requests
import requests.utils
import urllib3.exceptions

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.oci import MAX_DOCUMENT
from chatterbox_prewarm.image.references import is_loopback
from chatterbox_prewarm.image.registry.login import Login
from chatterbox_prewarm.image.registry.registry_errors import (
    TRANSIENT_STATUSES,
    TransientError,
    network_error,
    origin,
    quote_error,
    resolve_location,
    status_error,
    without_query,
)
from chatterbox_prewarm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from chatterbox_prewarm.image.references import ImageReference

logger = logging.getLogger(__name__)

#: Seconds without any data, and seconds to connect.
_TIMEOUT, _CONNECT_TIMEOUT = 120.0, 10.0
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
#: Bytes of a token response or an error body.
_MAX_BODY = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to a registry.

    Attributes:
        method: HTTP method. GET and HEAD follow redirects.
        url: absolute URL, or a path at the registry.
        subject: the resource, for messages, e.g. "manifest 1.0 of example/voice".
        scope: scope of the token, e.g. "repository:NAME:pull".
        expect: statuses that are returned. Any other status is an error; so is 401 if a login may still help.
        headers: additional headers.
        body: bytes, or an iterable with a length, which can be sent only once.
        timeout: seconds without any data.
    """

    method: str
    url: str
    subject: str
    scope: str
    expect: Collection[int] = frozenset({200})
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Iterable[bytes] | None = field(default=None, repr=False)
    timeout: float = _TIMEOUT


@dataclass(frozen=True, kw_only=True)
class Response:
    """A complete response of a registry. `url` is the final URL, after redirects."""

    status: int
    headers: Mapping[str, str]
    url: str
    body: bytes = field(repr=False)


class Transport:
    """Sends requests to one registry. Use each instance from one thread at a time.

    Args:
        reference: names the registry.
        insecure: use plain HTTP (True) or HTTPS (False). By default plain HTTP only to this machine, as Docker does.
        retry_delays: seconds before each retry, for the callers of `retry_policy`.

    Attributes:
        counters: "requests" (including those for tokens, and retries), "blobs_sent", "bytes_sent" and
            "bytes_received" (both of blobs, including repeated bytes).
    """

    def __init__(self, reference: ImageReference, *, insecure: bool | None, retry_delays: Sequence[float]) -> None:
        plain = is_loopback(reference.api_host) if insecure is None else insecure
        self.host = reference.host
        self.retry_delays = tuple(retry_delays)
        self.counters: Counter[str] = Counter()
        self._base = f"{'http' if plain else 'https'}://{reference.api_host}"
        self._reached = False
        self._login = Login(reference.host, self._base, self._fetch_token)
        self._session = requests.Session()
        # Otherwise requests replaces our Authorization header with a login from ~/.netrc.
        self._session.trust_env = False
        # requests parses the Location header and reads the body of a redirect even if it must not follow it.
        self._session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]  # noqa: ARG005
        self._session.headers.update({"User-Agent": f"chatterbox-prewarm/{__version__}", "Accept-Encoding": "identity"})
        self._verify = _certificate_authorities()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def send(self, request: Request) -> Response:
        """Send a request and read the whole response, at most MAX_DOCUMENT bytes.

        Raises:
            TransientError: the request failed, but a retry may succeed.
            EngineError: the registry refuses the request, or cannot be reached.
        """
        with self.open_stream(request) as response:
            return self._read_response(response, MAX_DOCUMENT, request.subject)

    def open_stream(self, request: Request) -> requests.Response:
        """Send a request and return the open response. The caller reads it with `read` and closes it.

        Raises:
            TransientError, EngineError: see `send`.
        """
        url = urllib.parse.urljoin(self._base, request.url)
        challenged = False
        for _ in range(_MAX_REDIRECTS + 2):
            # The login is only for the registry: neither a redirect target nor an upload server elsewhere gets it.
            at_registry = origin(url) == origin(self._base)
            authorization = self._login.authorization(request.scope) if at_registry else ""
            headers = {**request.headers, "Authorization": authorization} if authorization else request.headers
            response = self._exchange(request.method, url, headers, request.body, request.timeout)
            status = response.status_code
            login_may_help = status == 401 and at_registry and not challenged
            if status in request.expect and not login_may_help:
                return response
            with response:
                location = response.headers.get("Location")
                if status in _REDIRECTS and request.method in {"GET", "HEAD"} and location is not None:
                    url = resolve_location(url, location)
                    continue
                complete = self._read_response(response, _MAX_BODY, request.subject)
            if not login_may_help:
                raise self.error_for(request.method, request.subject, complete)
            self._login.handle_challenge(complete.headers.get("WWW-Authenticate", ""), request.scope)
            challenged = True
            if not isinstance(request.body, (bytes, type(None))):
                raise TransientError(f"the login expired while {request.subject} was sent", next_step="run it again")
        raise EngineError(
            f"the registry {self.host} redirects {request.method} {request.subject} more than {_MAX_REDIRECTS} times",
            next_step="see the registry's configuration",
        )

    def read(self, response: requests.Response, size: int, *, decode: bool = False) -> bytes:
        """Read at most `size` bytes of an open response, and decompress them if `decode` is set.

        Raises:
            TransientError: the connection broke.
        """
        try:
            content: bytes = response.raw.read(size, decode_content=decode)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise network_error(error, str(response.url), host=self.host, reached=self._reached) from error
        return content

    def error_for(self, method: str, subject: str, response: Response) -> EngineError:
        """Return the error for a response with an unexpected status."""
        problem = f"the registry {self.host} answered {response.status} to {method} {subject}"
        if origin(response.url) != origin(self._base):
            problem += f" (from {origin(response.url)}, after a redirect)"
        if response.status in {401, 403}:
            return self._login.error(f"{problem}: {quote_error(response.body)}".removesuffix(": "))
        return status_error(self.host, problem, response.status, response.headers, response.body)

    def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Iterable[bytes] | list[tuple[str, str]] | None,
        timeout: float,
    ) -> requests.Response:
        """Send one HTTP request and read the head of its response."""
        self.counters["requests"] += 1
        proxies = {} if is_loopback(urllib.parse.urlsplit(url).netloc) else requests.utils.get_environ_proxies(url)
        try:
            response = self._session.request(
                method,
                url,
                headers=dict(headers),
                data=body,
                timeout=(_CONNECT_TIMEOUT, timeout),
                allow_redirects=False,
                stream=True,
                proxies=proxies,
                verify=self._verify,
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise network_error(error, url, host=self.host, reached=self._reached) from error
        logger.debug("%s %s: %d", method, without_query(url), response.status_code)
        self._reached = True
        return response

    def _read_response(self, response: requests.Response, limit: int, subject: str) -> Response:
        """Read the rest of a response, at most `limit` bytes."""
        body = self.read(response, limit + 1, decode=True)
        if len(body) > limit:
            raise EngineError(
                f"{subject} is longer than {limit} bytes at the registry {self.host}", next_step="check the reference"
            )
        return Response(status=response.status_code, headers=response.headers, url=str(response.url), body=body)

    def _fetch_token(
        self, method: str, url: str, headers: Mapping[str, str], data: list[tuple[str, str]] | None
    ) -> tuple[int, bytes]:
        """Send a request to the token server, for `Login`. It follows no redirects."""
        subject = "the login token"
        with self._exchange(method, url, headers, data, _TIMEOUT) as response:
            complete = self._read_response(response, _MAX_BODY, subject)
        if complete.status in TRANSIENT_STATUSES:
            raise self.error_for(method, subject, complete)
        return complete.status, complete.body


def _certificate_authorities() -> str | bool:
    """Return the CA file that the environment names, or True for the certificates of requests."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if path := os.environ.get(variable):
            if not Path(path).exists():
                raise BadInputError(
                    f"{variable} names {path}, which does not exist", next_step="name an existing file, or unset it"
                )
            return path
    return True
