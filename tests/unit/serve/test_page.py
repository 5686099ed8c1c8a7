"""The page's files: under which policy they are sent, that nothing else is, and that an installation has them."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import httpx
import pytest
from starlette.applications import Starlette

from chatterbox_prewarm.serve.http import page
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

WEB = ROOT / "chatterbox_prewarm" / "serve" / "web"


def get(path: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=page.routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_the_page_and_all_it_names_are_sent_under_a_policy_that_allows_nothing_else() -> None:
    answer = get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="(page/[^"]+)"', answer.text))
    scripts = [path.read_text() for path in WEB.glob("*.js")]
    named |= {f"page/{name}" for text in scripts for name in re.findall(r'from "\./([^"]+)"', text)}
    assert {f"page/{path.name}" for path in WEB.iterdir()} == named | {"page/page.html"}
    for path in ("", *named):
        part = get(f"/{path}")
        assert part.status_code == 200
        assert "default-src 'none'" in part.headers["content-security-policy"]
        assert "unsafe" not in part.headers["content-security-policy"]
        assert part.headers["x-content-type-options"] == "nosniff"
    assert get("/page/page.js").headers["content-type"].startswith("text/javascript")


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    html = (WEB / "page.html").read_text()
    assert not re.search(r"<style|<script(?![^>]* src=)| style=| on[a-z]+=", html)
    for path in WEB.iterdir():
        addresses = re.findall(r"(?:https?:)?//[\w.]+\.[a-z]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org"}, path.name  # the name of SVG


def test_a_part_that_is_known_is_not_sent_again() -> None:
    tag = get("/page/page.css").headers["etag"]
    again = get("/page/page.css", **{"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/..%2fpage.py", "/page/../page.py", "/page/", "/page.py"])
def test_nothing_else_of_the_package_is_sent(path: str) -> None:
    assert get(path).status_code == 404


def test_an_installation_has_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "chatterbox_prewarm", source / "chatterbox_prewarm", ignore=shutil.ignore_patterns("__pycache__")
    )
    program = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    built = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next((source / "wheel").glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    assert {f"chatterbox_prewarm/serve/web/{path.name}" for path in WEB.iterdir()} <= held
