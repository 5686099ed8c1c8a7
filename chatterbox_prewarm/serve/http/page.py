"""The web page at `/`: the files of `web/`, sent with a Content-Security-Policy that allows no other origin."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.requests import Request

_FOLDER = Path(__file__).parents[1] / "web"
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: `media-src blob:` lets the page play the speech that it has received and keeps in memory.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; media-src blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def routes() -> list[Route]:
    """Return the routes `/` and `/page/NAME`."""
    return [Route("/", _send_file), Route("/page/{name}", _send_file)]


async def _send_file(request: Request) -> Response:
    name = request.path_params.get("name", "page.html")
    content = _files().get(name)
    if content is None:
        return Response("the page has no such file\n", status_code=404, media_type="text/plain")
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "Cache-Control": "no-cache",  # the browser revalidates, so it notices a new version of the server
        "Content-Security-Policy": POLICY,
        "ETag": etag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[Path(name).suffix], headers=headers)


@functools.cache
def _files() -> dict[str, bytes]:
    """Read all files of the page by name. Requests look names up here, so they never reach the file system."""
    return {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}
