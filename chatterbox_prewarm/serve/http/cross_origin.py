"""Requests of web pages: which pages may use this server from a browser.

A browser adds credentials to requests that another site's page makes: a Basic password, or access to a private network.
Such a page could add voices or request speech. Its host name could also resolve to this server (DNS rebinding), and
then the browser takes the server for the page's site.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from starlette.types import ASGIApp

#: Allows the pages of every site.
EVERY = "*"
#: Names of the local machine and network. A public name server cannot let them resolve to an address.
_LOCAL = (".localhost", ".local", ".internal")


@dataclass(frozen=True, kw_only=True)
class Sites:
    """The pages that may use this server from a browser. Pages that this server has certainly sent need no entry.

    Attributes:
        hosts: names of this server, as `parse_host` returns them. If there are any, requests to others are refused.
        origins: other sites, as `parse_origin` returns them.
    """

    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def knows_host(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether the requested name belongs to this server. Local names and IP addresses always do."""
        parts = _split("//" + headers.get(b"host", b"").decode("latin-1"))
        return not self.hosts or _is_local(parts) or self._has_name(parts)

    def allows_origin(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether the page that made this request belongs to an allowed origin."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        return bool(origin) and (origin in self.origins or EVERY in self.origins)

    def is_foreign(self, headers: Mapping[bytes, bytes], *, has_password: bool) -> bool:
        """Check whether a page that this server did not send made this request.

        Browsers send `Sec-Fetch-Site` to this machine or over HTTPS. Over plain HTTP to another machine they send only
        `Origin`, which is compared with the requested host; a proxy may keep the original host in `X-Forwarded-Host`.
        A page cannot set these headers without a CORS preflight. A client that sends neither header is not a browser.

        Args:
            headers: the headers of the request.
            has_password: True if the browser has sent the password of this server, which it stores for one origin.
        """
        site = headers.get(b"sec-fetch-site")
        if site is not None:
            return site not in {b"same-origin", b"none"}
        if b"origin" not in headers:
            return False
        origin = _split(headers[b"origin"].decode("latin-1"))
        if self._has_name(origin):
            return False
        netloc = origin.netloc.lower().encode("latin-1")
        if not netloc or netloc not in {
            headers.get(name, b"").strip().lower() for name in (b"host", b"x-forwarded-host")
        }:
            return True
        # The page and the server have the same name. Without HTTPS and a password, the page may have chosen the name.
        return not (has_password or origin.scheme == "https" or _is_local(origin))

    def _has_name(self, parts: SplitResult) -> bool:
        """Return whether the host is one of `hosts`, which may have a port."""
        name = _host(parts)
        return bool(name) and (name in self.hosts or _with_port(parts) in self.hosts)


def parse_host(text: str) -> str:
    """Return a host in the form that browsers send, such as `tts.example` or `tts.example:8000`.

    Raises:
        BadInputError: the text is not a host.
    """
    parts = _split("//" + text)
    if not _host(parts) or parts.netloc != text or "@" in text:
        raise BadInputError(
            f"{text!r} is not the name of a host",
            next_step="write it as tts.example, with the port if only that counts",
        )
    if parts.port in {80, 443}:
        raise BadInputError(
            f"{text!r} has a default port, which browsers leave out", next_step=f"write it as {parts.hostname}"
        )
    return _with_port(parts)


def _split(url: str) -> SplitResult:
    """Split a URL; an invalid one has no parts."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return urlsplit("")
    return parts


def _host(parts: SplitResult) -> str:
    host = (parts.hostname or "").removesuffix(".")
    return f"[{host}]" if ":" in host else host


def _with_port(parts: SplitResult) -> str:
    return _host(parts) + (f":{parts.port}" if parts.port else "")


def _is_local(parts: SplitResult) -> bool:
    """Return whether this is an IP address, a name without a dot, or a name of the local machine or network."""
    host = (parts.hostname or "").removesuffix(".")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return bool(host) and ("." not in host or host.endswith(_LOCAL))
    return True


def parse_origin(text: str) -> str:
    """Return an origin in the form that browsers send, such as `https://chat.example:8443`, or `*`.

    Raises:
        BadInputError: the text is not an origin.
    """
    if text == EVERY:
        return text
    parts = _split(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/") or parts.query:
        raise BadInputError(
            f"{text!r} is not the origin of a page", next_step="write it as https://chat.example, with the port if any"
        )
    is_standard = parts.port == {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{_host(parts) if is_standard else _with_port(parts)}"


def allow_origins(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Wrap `app` in Starlette's CORS middleware, which answers preflights and adds the headers to responses.

    It wraps the access control, because a browser sends preflights without the token. Pages get no access to passwords
    that the browser has stored: they send the token themselves.

    Args:
        app: the application with its access control.
        origins: results of `parse_origin`. Without any, browsers let no page of another site read a response.
    """
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After", "X-Finish-Reason", "X-Skipped-Parts"],
    )
