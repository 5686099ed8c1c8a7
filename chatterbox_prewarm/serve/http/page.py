"""The page at `/`: the files of `web/`, as they are, under a policy that allows nothing from elsewhere."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

_FOLDER = Path(__file__).parents[1] / "web"
_PAGE = "page.html"
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: Sound that was spoken is played from the page's own memory, which is a blob; nothing else comes from anywhere else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def routes() -> list[Route]:
    """The routes of the page: `/`, and `/page/NAME` for what it consists of."""
    from starlette.routing import Route

    return [Route("/", _page), Route("/page/{name}", _part)]


async def _page(request: Request) -> Response:
    return _answer(request, _PAGE)


async def _part(request: Request) -> Response:
    return _answer(request, request.path_params["name"])


def _answer(request: Request, name: str) -> Response:
    from starlette.responses import Response

    file = _files().get(name)
    if file is None:
        return Response("the page has no such part\n", status_code=404, media_type="text/plain")
    headers = {
        "Cache-Control": "no-cache",  # asked for again each time, and sent again only when another version serves it
        "Content-Security-Policy": POLICY,
        "ETag": file.etag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@functools.cache
def _files() -> dict[str, _File]:
    """What may be asked for, by name; a name that is not among these reaches no file system."""
    return {
        path.name: _File(
            content=(content := path.read_bytes()),
            media_type=_TYPES[path.suffix],
            etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        )
        for path in _FOLDER.iterdir()
        if path.suffix in _TYPES
    }
