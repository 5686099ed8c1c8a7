"""Access control: the bearer token that a server can require, and protection against the pages of other sites.

A request that changes something or makes the model speak must either contain a bearer token, which no browser adds by
itself, or come from a page of this server. `cross_origin` explains why.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.serve.http.cross_origin import Sites
from chatterbox_prewarm.serve.http.error_responses import error_response
from chatterbox_prewarm.system.children import TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping
    from pathlib import Path

    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

#: The variable with the path of a file with the token. No option takes the token itself, because all users of a
#: machine can read a command line.
TOKEN_FILE = f"{TOKEN}_FILE"
#: The paths that a kubelet requests. It sends no token.
_PROBE = re.compile(r"/livez|/startupz|/readyz(/[a-z0-9-]{1,64})?", re.ASCII)

_KEY = "chatterbox_prewarm.authorized"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_REALM = 'realm="chatterbox-prewarm"'
#: A route that makes the model speak, although its method is GET. Starlette's routes also match with a final newline.
_PREVIEW = re.compile(r"/v1/audio/voices/[^/]+/preview\n?")
_MAX_LENGTH = 4096
#: 96 bits in base64. A shorter token can be guessed in a feasible time.
_MIN_STRONG_LENGTH = 16


def is_probe(path: str) -> bool:
    """Return whether a path is that of a probe."""
    return _PROBE.fullmatch(path) is not None


class Token:
    """The token that clients must send. A token from a file is read again when the file changes.

    The object keeps only a hash of the token, so no log line or traceback can reveal it.

    Args:
        path: the file with the token; white space around the token is ignored.
        text: the token, if there is no file.

    Raises:
        BadInputError: the file cannot be read, or the token is empty or does not fit in an HTTP header.
    """

    def __init__(self, path: Path | None = None, *, text: str = "") -> None:
        self._path = path
        self._version: tuple[int, int, int] | None = None
        self._last_problem = ""
        if path is None:
            self._set(text.encode("utf-8", "surrogateescape"), TOKEN)
        else:
            self._read(path)

    def matches(self, candidate: bytes) -> bool:
        """Compare `candidate` with the token, in a time that does not depend on the position of a difference."""
        self._refresh()
        return hmac.compare_digest(hashlib.sha256(candidate).digest(), self._digest)

    def _refresh(self) -> None:
        """Read the file again if it has changed. Keeps the previous token while the file has no valid one."""
        if self._path is None:
            return
        problem = ""
        try:
            if _version(self._path) != self._version:
                self._read(self._path)
                logger.info("read the token again: %s has changed", self._path)
        except BadInputError as error:
            problem = error.message
            if problem != self._last_problem:  # log it once, not for each request
                logger.warning("the previous token stays valid: %s", problem)
        self._last_problem = problem

    def _read(self, path: Path) -> None:
        version = _version(path)  # before the content, so that a change between the two causes another read
        try:
            with path.open("rb") as stream:
                content = stream.read(_MAX_LENGTH + 1)
        except OSError as error:
            raise from_os_error(error, "reading the token") from error
        self._set(content, str(path))
        self._version = version

    def _set(self, content: bytes, source: str) -> None:
        token = content.strip()
        problem = (
            "is empty"
            if not token
            else f"has more than {_MAX_LENGTH} characters"
            if len(token) > _MAX_LENGTH
            else "contains characters that no HTTP header can carry unchanged"
            if not all(0x21 <= byte <= 0x7E for byte in token)
            else None
        )
        if problem:
            next_step = "create one from letters and digits: openssl rand -hex 32"
            raise BadInputError(f"the token from {source} {problem}", next_step=next_step)
        self._digest = hashlib.sha256(token).digest()
        self.is_weak = len(token) < _MIN_STRONG_LENGTH


def load_token(path: Path | None, environment: MutableMapping[str, str] | None = None) -> Token | None:
    """Load the required token from the file `path` or from the environment. Returns None if there is no token.

    The variable is removed from the environment, so that child processes do not inherit it. `/proc/PID/environ` still
    shows it, so a file is safer.

    Raises:
        BadInputError: both sources have a token, or the token is empty or does not fit in an HTTP header.
    """
    environment = os.environ if environment is None else environment
    text = environment.pop(TOKEN, None)
    if path is not None and text is not None:
        raise BadInputError(f"{TOKEN} and a file ({path}) both contain a token", next_step="give only one of them")
    if path is None and text is None:
        return None
    token = Token(path, text=text or "")
    if token.is_weak:
        logger.warning("the token has fewer than %d characters and can be guessed", _MIN_STRONG_LENGTH)
    return token


def visible_status(scope: Scope, status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `status` that the client may see: without the token only `phase`, `attached` and `ready`."""
    authorized = scope.get(_KEY, True)
    return {name: value for name, value in status.items() if authorized or name in {"phase", "attached", "ready"}}


def check_access(app: ASGIApp, token: Token | None, sites: Sites | None = None) -> ASGIApp:
    """Wrap `app` in middleware that responds with 401 or 403 to requests without the necessary rights.

    Args:
        app: the application.
        token: required by all requests except the probes; None accepts requests without a token.
        sites: whose pages may change something. A password that the browser has stored does not count for the pages of
            an allowed origin.
    """
    known = sites or Sites()

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise AssertionError(f"the server does not support {scope['type']}")
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        scheme, secret = _credentials(headers)
        authorized = token is None or (secret is not None and token.matches(secret))
        scope[_KEY] = authorized
        refusal: ASGIApp | None = None
        if not is_probe(scope["path"]):
            if not authorized:
                refusal = _unauthorized(headers)
            elif scheme != b"bearer" or token is None:
                refusal = _site_refusal(
                    scope, dict(headers), known, is_basic=scheme == b"basic", has_token=token is not None
                )
        await (refusal or app)(scope, receive, send)

    return middleware


def _version(path: Path) -> tuple[int, int, int]:
    """Return values that change when the file is written, or replaced as in a Kubernetes secret."""
    try:
        status = path.stat()
    except OSError as error:
        raise from_os_error(error, "reading the token") from error
    return status.st_ino, status.st_mtime_ns, status.st_size


def _credentials(headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes | None]:
    """Return the scheme and the secret of the only Authorization header. A browser sends the secret as a password."""
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


def _site_refusal(
    scope: Scope, headers: Mapping[bytes, bytes], sites: Sites, *, is_basic: bool, has_token: bool
) -> ASGIApp | None:
    """Return the response to a request that a page of another site may have made; None if there is no such doubt."""
    if not sites.knows_host(headers):
        host = headers.get(b"host", b"").decode("latin-1")
        return error_response(403, f"{host[:100]!r} is no name of this server: see --allowed-host", "unknown_host")
    if scope["method"] in _SAFE and not _PREVIEW.fullmatch(scope["path"]):
        return None
    if not is_basic and sites.allows_origin(headers):
        return None
    if not sites.is_foreign(headers, has_password=is_basic and has_token):
        return None
    origin = headers.get(b"origin", b"another site").decode("latin-1")
    message = (
        f"a page of {origin[:100]!r} sent this request. If this server sent the page, start it with --allowed-host and "
        "the name in the address of the page. If another site may use this server, start it with --allow-origin"
    )
    return error_response(403, message + (", or send the token as a bearer token" if has_token else ""), "cross_site")


def _unauthorized(headers: list[tuple[bytes, bytes]]) -> ASGIApp:
    response = error_response(
        401, "this server requires a token, and the request has no token or a wrong one", "invalid_api_key"
    )
    response.headers.append("WWW-Authenticate", f"Bearer {_REALM}")
    # The Basic challenge makes a browser ask for the password when it loads the page. A request from the page's own
    # script must not open that dialog: the page shows the error itself.
    if dict(headers).get(b"sec-fetch-dest") != b"empty":
        response.headers.append("WWW-Authenticate", f'Basic {_REALM}, charset="UTF-8"')
    return response
