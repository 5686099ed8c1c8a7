"""A hook of mkdocs: links from the pages to files outside docs/ become the path of the file."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the links that only a checkout of the repository can follow; mkdocs calls this for each page."""

    def replace(link: re.Match[str]) -> str:
        text, path = link.group(1), link.group(2)
        return text if path in text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(replace, markdown)
