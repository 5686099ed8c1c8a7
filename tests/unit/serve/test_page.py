"""The files of the web page: their security policy, protection of other files, and their presence in a wheel."""

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
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Starlette(routes=page.routes()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_all_files_of_the_page_are_sent_with_a_strict_security_policy() -> None:
    response = get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    referenced = set(re.findall(r'(?:src|href)="(page/[^"]+)"', response.text))
    scripts = [path.read_text() for path in WEB.glob("*.js")]
    referenced |= {f"page/{name}" for text in scripts for name in re.findall(r'from "\./([^"]+)"', text)}
    assert {f"page/{path.name}" for path in WEB.iterdir()} == referenced | {"page/page.html"}
    for path in ("", *referenced):
        file = get(f"/{path}")
        assert file.status_code == 200
        assert "default-src 'none'" in file.headers["content-security-policy"]
        assert "unsafe" not in file.headers["content-security-policy"]
        assert file.headers["x-content-type-options"] == "nosniff"
    assert get("/page/page.js").headers["content-type"].startswith("text/javascript")


def test_the_page_has_no_inline_code_and_no_foreign_urls() -> None:
    html = (WEB / "page.html").read_text()
    assert not re.search(r"<style|<script(?![^>]* src=)| style=| on[a-z]+=", html)
    for path in WEB.iterdir():
        addresses = re.findall(r"(?:https?:)?//[\w.]+\.[a-z]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org"}, path.name  # the namespace of SVG


def test_an_unchanged_file_is_not_sent_again() -> None:
    etag = get("/page/page.css").headers["etag"]
    revalidated = get("/page/page.css", **{"If-None-Match": etag})
    assert (revalidated.status_code, revalidated.content) == (304, b"")


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/..%2fpage.py", "/page/../page.py", "/page/", "/page.py"])
def test_other_files_of_the_package_are_not_sent(path: str) -> None:
    assert get(path).status_code == 404


def test_a_wheel_contains_the_page_and_the_license(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "chatterbox_prewarm", source / "chatterbox_prewarm", ignore=shutil.ignore_patterns("__pycache__")
    )
    program = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    completed = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    with zipfile.ZipFile(next((source / "wheel").glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {f"chatterbox_prewarm/serve/web/{path.name}" for path in WEB.iterdir()} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
