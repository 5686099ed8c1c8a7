"""Cross-origin requests: which pages of other sites may use this server from a browser."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp

#: Allows the pages of every site.
EVERY = "*"


def parse_origin(text: str) -> str:
    """Return an origin in the form that browsers send, such as `https://chat.example:8443`, or `*`.

    Raises:
        BadInputError: the text is not an origin.
    """
    if text == EVERY:
        return text
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/") or parts.query:
        raise BadInputError(
            f"{text!r} is not the origin of a page", next_step="write it as https://chat.example, with the port if any"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    standard = port is None or port == {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if standard else f":{port}")


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
        expose_headers=["Retry-After", "X-Finish-Reason"],
    )
