"""Requests to one registry: the login, redirects, and what is tried again."""

from __future__ import annotations

import logging
import os
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import requests
import requests.utils
import urllib3.exceptions

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.oci import MAX_DOCUMENT
from chatterbox_prewarm.image.references import is_loopback
from chatterbox_prewarm.image.registry.login import Login
from chatterbox_prewarm.image.registry.registry_errors import (
    PASSING,
    TransientError,
    broken,
    origin,
    refusal,
    resolve,
    shown,
    words_of,
)
from chatterbox_prewarm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from chatterbox_prewarm.image.references import ImageReference

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: Seconds before each further attempt.
WAITS = (0.5, 1.0, 2.0, 4.0)
#: Seconds without a byte, and until a connection stands.
_TIMEOUT, _CONNECT = 120.0, 10.0
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 5
_MAX_TOKEN = 1 << 20


@dataclass(kw_only=True)
class Counters:
    """What went to and fro; for benchmarks.

    Attributes:
        requests: made, with those for tokens, and repeated ones.
        blobs_sent: stored by us; not those that were there.
        bytes_sent, bytes_received: of blobs, with what was sent or received twice.
    """

    requests: int = 0
    blobs_sent: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A registry's answer, with its body."""

    status: int
    headers: Mapping[str, str]
    #: Where it came from, after redirects.
    url: str
    body: bytes = field(repr=False)


class Body:
    """A body that is made as it is sent, of a known length in bytes."""

    def __init__(self, length: int, blocks: Iterator[bytes]) -> None:
        self._length = length
        self._blocks = blocks

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        return self._blocks


class _Session(requests.Session):
    """Leaves redirects to us; without this it parses and reads them even when it is not to follow them."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002
        return None


class Transport:
    """Requests to one registry; not for several threads at once.

    Args:
        reference: which registry.
        insecure: plain HTTP (True), HTTPS (False), or as Docker has it (None): plain to this machine alone.
        waits: seconds before each further attempt.
    """

    def __init__(
        self, reference: ImageReference, *, insecure: bool | None = None, waits: Sequence[float] = WAITS
    ) -> None:
        local = is_loopback(reference.api_host)
        plain = local if insecure is None else insecure
        self.host = reference.host
        self.base = f"{'http' if plain else 'https'}://{reference.api_host}"
        self.waits = tuple(waits)
        self.counters = Counters()
        self._reached = False
        self._login = Login(reference.host, self.base, self._fetch)
        self._session = _Session()
        # Nothing of the environment unless we put it there: requests would send what ~/.netrc has in our login's place.
        self._session.trust_env = False
        self._session.headers.update({"User-Agent": f"chatterbox-prewarm/{__version__}", "Accept-Encoding": "identity"})
        self._verify = _authorities()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def request(
        self,
        method: str,
        url: str,
        *,
        what: str,
        scope: str,
        expect: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: bytes | Body | None = None,
        attempts: int | None = None,
        timeout: float = _TIMEOUT,
    ) -> Answer:
        """Send a request and read the whole answer, at most MAX_DOCUMENT bytes.

        Args:
            method: of HTTP; GET and HEAD follow redirects.
            url: absolute, or below the registry.
            what: the request is about, for messages.
            scope: that a token is to have, as in "repository:NAME:pull".
            expect: the statuses that are handed back, a 401 only after a login; any other is an error.
            headers: besides those of every request.
            body: a `Body` can be sent once.
            attempts: all by default; 1 for what the caller tries again itself.
            timeout: seconds without a byte.

        Raises:
            TransientError: it failed, or the registry is busy, and the attempts are used up.
            EngineError: the registry refuses.
        """

        def attempt() -> Answer:
            with self._follow(method, url, what, scope, expect, headers or {}, body, timeout) as response:
                content = self._read(response, MAX_DOCUMENT, what)
                return Answer(
                    status=response.status_code, headers=response.headers, url=str(response.url), body=content
                )

        return self._patiently(attempt, attempts)

    def stream(
        self,
        url: str,
        *,
        what: str,
        scope: str,
        expect: Collection[int],
        headers: Mapping[str, str],
        attempts: int | None = None,
    ) -> requests.Response:
        """Begin to read something large; the caller reads `.raw` and closes. As `request` otherwise."""

        def attempt() -> requests.Response:
            return self._follow("GET", url, what, scope, expect, headers, None, _TIMEOUT)

        return self._patiently(attempt, attempts)

    def refusal(self, method: str, what: str, answer: Answer) -> EngineError:
        """What an answer that is not the one hoped for means."""
        problem = f"the registry {self.host} answered {answer.status} to {method} {what}"
        if origin(answer.url) != origin(self.base):
            problem += f" (from {origin(answer.url)}, where it sent us)"
        if answer.status in {401, 403}:
            return self._login.refused(f"{problem}: {words_of(answer.body)}".removesuffix(": "))
        return refusal(self.host, problem, answer.status, answer.headers, answer.body)

    def _patiently(self, attempt: Callable[[], _T], attempts: int | None) -> _T:
        waits = self.waits if attempts is None else self.waits[: attempts - 1]
        for wait in waits:
            try:
                return attempt()
            except TransientError as error:
                pause(error, wait)
        return attempt()

    def _follow(
        self,
        method: str,
        url: str,
        what: str,
        scope: str,
        expect: Collection[int],
        headers: Mapping[str, str],
        body: bytes | Body | None,
        timeout: float,
    ) -> requests.Response:
        """Send, log in if asked to, and follow redirects; the response is open, and of an expected status."""
        url = urllib.parse.urljoin(self.base, url)
        asked = False
        for _ in range(_MAX_REDIRECTS + 2):
            ours = origin(url) == origin(self.base)
            # The login is the registry's: nothing of it goes to where a redirect or an upload's address leads.
            authorization = self._login.header(scope) if ours else ""
            sent = {**headers, "Authorization": authorization} if authorization else headers
            response = self._exchange(method, url, sent, body, timeout)
            status = response.status_code
            if status in expect and (status != 401 or asked or not ours):
                return response
            with response:
                if status in _REDIRECTS and method in {"GET", "HEAD"} and "Location" in response.headers:
                    url = resolve(url, response.headers["Location"])
                    continue
                content = self._read(response, _MAX_TOKEN, what)
            answer = Answer(status=status, headers=response.headers, url=url, body=content)
            if status != 401 or not ours or asked:
                raise self.refusal(method, what, answer)
            self._login.answer(answer.headers.get("WWW-Authenticate", ""), scope)
            asked = True
            if isinstance(body, Body):
                raise TransientError(f"the login ended in the middle of {what}", next_step="run it again")
        raise EngineError(
            f"the registry {self.host} redirects {method} {what} more than {_MAX_REDIRECTS} times",
            next_step="see the registry's configuration",
        )

    def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | Body | list[tuple[str, str]] | None,
        timeout: float,
    ) -> requests.Response:
        """One request and the head of its response."""
        self.counters.requests += 1
        proxies = {} if is_loopback(urllib.parse.urlsplit(url).netloc) else requests.utils.get_environ_proxies(url)
        try:
            response = self._session.request(
                method,
                url,
                headers=dict(headers),
                data=body,
                timeout=(_CONNECT, timeout),
                allow_redirects=False,
                stream=True,
                proxies=proxies,
                verify=self._verify,
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self.failure(error, url) from error
        logger.debug("%s %s: %d", method, shown(url), response.status_code)
        self._reached = True
        return response

    def _read(self, response: requests.Response, limit: int, what: str) -> bytes:
        try:
            content: bytes = response.raw.read(limit + 1, decode_content=True)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self.failure(error, str(response.url)) from error
        if len(content) > limit:
            raise EngineError(
                f"{what} is longer than {limit} bytes at the registry {self.host}", next_step="check the reference"
            )
        return content

    def failure(self, error: Exception, url: str) -> EngineError:
        """What an error of reading an answer means."""
        return broken(error, url, host=self.host, reached=self._reached)

    def _fetch(
        self, method: str, url: str, *, headers: Mapping[str, str], data: list[tuple[str, str]] | None
    ) -> tuple[int, bytes]:
        """A request to the server of the tokens: no login but the given, no redirect."""
        what = "the token for the login"
        with self._exchange(method, url, headers, data, _TIMEOUT) as response:
            content = self._read(response, _MAX_TOKEN, what)
            if response.status_code in PASSING:
                answer = Answer(status=response.status_code, headers=response.headers, url=url, body=content)
                raise self.refusal(method, what, answer)
            return response.status_code, content


def _authorities() -> str | bool:
    """Whose certificates are trusted: by the variables that requests knows, or those that it brings (True)."""
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if path := os.environ.get(variable):
            if not Path(path).exists():
                raise BadInputError(
                    f"{variable} names {path}, which is not there", next_step="name a file, or unset it"
                )
            return path
    return True


def pause(error: TransientError, wait: float) -> None:
    """Wait before a further attempt, as long as the registry asks for if it does, and say so."""
    seconds = max(error.wait, wait)
    logger.warning("%s; trying again in %.1f s", error.message, seconds)
    time.sleep(seconds)
