"""Check a page with axe-core in Chromium, in each size and colour scheme."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Collection

    from selenium import webdriver

_package = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed (it is in the extra `dev`)")
_AXE = Path(_package.__file__).with_name("axe.min.js").read_text()
#: WCAG 2.2 at level AA, and axe-core's own advice. Without this list axe-core leaves out the size of targets.
_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
_RUN = """
const [rules, done] = arguments;
axe.run(document, { runOnly: rules }).then(done, (error) => done({ error: String(error) }));
"""
DESKTOP, PHONE = (1280, 1000), (360, 740)


def violations(driver: webdriver.Chrome, *, applied: Collection[str]) -> list[str]:
    """Return a line for each violation on the page that the browser shows, in a window and on a phone, light and dark.

    Args:
        driver: the browser.
        applied: rules that must have found something to judge. An axe-core that sees no text must not pass.
    """
    return [
        line
        for size in (DESKTOP, PHONE)
        for scheme in ("light", "dark")
        for line in _run(driver, size, scheme, applied)
    ]


def _run(driver: webdriver.Chrome, size: tuple[int, int], scheme: str, applied: Collection[str]) -> list[str]:
    show(driver, size, scheme)
    driver.execute_script(_AXE)
    result: dict[str, Any] = driver.execute_async_script(_RUN, list(_RULES))
    assert "error" not in result, result["error"]
    assert set(applied) <= {rule["id"] for rule in result["passes"]}
    return [
        f"{size[0]} px, {scheme}: {rule['id']}: {rule['help']}: {node['html']}: {node['failureSummary']}"
        for rule in result["violations"]
        for node in rule["nodes"]
    ]


def show(driver: webdriver.Chrome, size: tuple[int, int], scheme: str = "light") -> None:
    """Give the window a size, `PHONE` with a phone's way to lay out a page, and a colour scheme."""
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
