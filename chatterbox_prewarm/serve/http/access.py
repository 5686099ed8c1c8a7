"""Who may ask: the token that a server can demand, and the other sites' pages that a browser must not act for.

A browser sends what it knows of a server, a Basic password or the mere reach of a private address, with the requests
that any other page makes. Forms of such a page could add voices or have texts spoken. So a request that changes
something and shows no bearer token, which no browser adds by itself, must come from a page of this server.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.serve.http.speech_api import failure

if TYPE_CHECKING:
    from collections.abc import MutableMapping
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

#: The token itself; an option for it would show it to everybody who lists processes.
TOKEN = "CHATTERBOX_PREWARM_TOKEN"  # noqa: S105 - the variable's name
TOKEN_FILE = f"{TOKEN}_FILE"
#: What a kubelet asks, which sends no token.
PROBES = frozenset({"/livez", "/startupz", "/readyz"})

_KEY = "chatterbox_prewarm.authorized"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_REALM = 'realm="chatterbox-prewarm"'
_LONGEST = 4096
#: 96 bits in base64; below that a token can be guessed by somebody who may try for long enough.
_SHORTEST_STRONG = 16


@dataclass(frozen=True)
class _Seen:
    """A token, and the state of its file when it was read."""

    token: bytes = field(repr=False)
    state: tuple[int, int, int] | None


class Token:
    """The token that is demanded now. One from a file is read again when the file changes; no text shows it."""

    def __init__(self, seen: _Seen, path: Path | None = None) -> None:
        self._path = path
        self._seen = seen
        self._complaint = ""

    @classmethod
    def from_text(cls, text: str, where: str) -> Token:
        """The token `text`, which stands in `where`.

        Raises:
            BadInputError: it is empty, or no client could send it.
        """
        return cls(_Seen(_check(text.encode("utf-8", "surrogateescape").strip(), where), None))

    @classmethod
    def from_file(cls, path: Path) -> Token:
        """The token that `path` holds, white space around it left out.

        Raises:
            BadInputError: the file cannot be read, or holds no token.
        """
        return cls(_read(path), path)

    @property
    def is_weak(self) -> bool:
        """Whether it is so short that it can be guessed."""
        return len(self._current()) < _SHORTEST_STRONG

    def matches(self, given: bytes) -> bool:
        """Whether `given` is the token, compared in a time that does not depend on where they differ."""
        return hmac.compare_digest(given, self._current())

    def _current(self) -> bytes:
        """What the file holds; the last that could be used while it holds nothing that can."""
        if self._path is None:
            return self._seen.token
        try:
            if _state(self._path) != self._seen.state:
                self._seen = _read(self._path)
                logger.info("the token was read again: %s has changed", self._path)
        except BadInputError as error:
            if error.message != self._complaint:  # once, not for each request
                logger.warning("the token stays what it was: %s", error.message)
            self._complaint = error.message
        else:
            self._complaint = ""
        return self._seen.token


def load_token(path: Path | None, environment: MutableMapping[str, str] | None = None) -> Token | None:
    """The token that a server is to demand, from the file `path` or from the environment; None for none.

    The variable is taken out of the environment, so that the processes that are started later do not have it.

    Raises:
        BadInputError: there is a token in both places, or an empty one, or one that no HTTP header could carry.
    """
    environment = os.environ if environment is None else environment
    text = environment.pop(TOKEN, None)
    if path is not None and text is not None:
        raise BadInputError(f"a token is given both by {TOKEN} and in a file ({path})", next_step="give only one")
    if path is not None:
        token = Token.from_file(path)
    elif text is not None:
        token = Token.from_text(text, TOKEN)
    else:
        return None
    if token.is_weak:
        logger.warning("the token has fewer than %d characters and can be guessed", _SHORTEST_STRONG)
    return token


def is_authorized(scope: Scope) -> bool:
    """Whether a request may see everything: it showed the token, or none is demanded."""
    return bool(scope.get(_KEY, True))


def status_for(scope: Scope, body: dict[str, Any]) -> dict[str, Any]:
    """Of a probe's `body` what the asker may see: without the token, only what its status says, and the phase."""
    if is_authorized(scope):
        return body
    return {name: body[name] for name in ("phase", "attached", "ready") if name in body}


class Access:
    """ASGI middleware that lets a request through to `app` if it may be made.

    Args:
        app: the application.
        token: what is demanded of every request but the probes; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, token: Token | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or let the application answer."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise AssertionError(f"nothing here speaks {scope['type']}")
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        scheme, secret = _credentials(headers)
        known = self._token is None or (secret is not None and self._token.matches(secret))
        scope[_KEY] = known
        if not known and scope["path"] not in PROBES:
            await _unauthorized(headers)(scope, receive, send)
        elif scope["method"] not in _SAFE and not (known and scheme == b"bearer") and _is_foreign(headers):
            message = "a page of another site asked for this in its user's name; show the token as a bearer token"
            await failure(403, message, "cross_site")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _read(path: Path) -> _Seen:
    state = _state(path)  # before its content: a file that changes in between is read once more
    try:
        with path.open("rb") as stream:
            content = stream.read(_LONGEST + 1)
    except OSError as error:
        raise from_os_error(error, "reading the token") from error
    return _Seen(_check(content.strip(), str(path)), state)


def _check(token: bytes, where: str) -> bytes:
    """Return `token` if a client can send it; what is wrong is said without showing it."""
    wrong = (
        "is empty"
        if not token
        else f"has more than {_LONGEST} characters"
        if len(token) > _LONGEST
        else "has characters that no HTTP header carries as they are"
        if not all(0x21 <= byte <= 0x7E for byte in token)
        else None
    )
    if wrong:
        raise BadInputError(
            f"the token of {where} {wrong}", next_step="make one of letters and digits: openssl rand -hex 32"
        )
    return token


def _state(path: Path) -> tuple[int, int, int]:
    """What differs when a file was written or, as in a secret of Kubernetes, another put in its place."""
    try:
        status = path.stat()
    except OSError as error:
        raise from_os_error(error, "reading the token") from error
    return status.st_ino, status.st_mtime_ns, status.st_size


def _credentials(headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes | None]:
    """The scheme of the one Authorization header, and the secret in it; a browser can send it as Basic's password."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        return b"", None
    scheme, _, rest = values[0].strip().partition(b" ")
    scheme, rest = scheme.lower(), rest.strip()
    if scheme == b"bearer":
        return scheme, rest
    if scheme == b"basic":
        try:
            _, colon, password = base64.b64decode(rest, validate=True).partition(b":")
        except binascii.Error:
            return scheme, None
        return scheme, password if colon else None
    return scheme, None


def _is_foreign(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether a browser says that a page of another site made this request.

    `Sec-Fetch-Site` says it plainly, but not on plain HTTP to other machines; `Origin` is compared with the host that
    was asked for there, of which a proxy may have kept the original name. A page cannot set any of them for a request
    that needs no consent. What sends neither is no browser.
    """
    found = dict(headers)
    site = found.get(b"sec-fetch-site")
    if site is not None:
        return site not in {b"same-origin", b"none"}
    origin = found.get(b"origin")
    if origin is None:
        return False
    asked = {found.get(name, b"").strip().lower() for name in (b"host", b"x-forwarded-host")}
    try:
        netloc = urlsplit(origin.decode("ascii")).netloc.lower().encode()
    except ValueError:  # not ASCII, or no URL
        return True
    return not netloc or netloc not in asked


def _unauthorized(headers: list[tuple[bytes, bytes]]) -> ASGIApp:
    response = failure(
        401, "this server demands a token, and the request showed none or a wrong one", "invalid_api_key"
    )
    response.headers.append("WWW-Authenticate", f"Bearer {_REALM}")
    # A browser asks its user for a password when it opens the page, and gives it to the page's parts when they are
    # refused too. To a script's own request it would open its dialog over the page, which says itself what is wrong.
    if dict(headers).get(b"sec-fetch-dest") != b"empty":
        response.headers.append("WWW-Authenticate", f'Basic {_REALM}, charset="UTF-8"')
    return response
