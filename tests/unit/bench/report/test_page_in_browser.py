"""The page of a report in Chromium: readable in a window and on a phone, in light and dark, without violations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from chatterbox_prewarm import generate_warmup_report
from tests.helpers.axe import DESKTOP, PHONE, show, violations
from tests.helpers.chromium import chromium
from tests.helpers.reports import results

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from selenium import webdriver

pytestmark = pytest.mark.programs

#: Return what a reader could miss: images without content, and elements outside the window that nothing scrolls to.
_LOST = """
const lost = [];
if (document.documentElement.scrollWidth > window.innerWidth) {
  lost.push(`the page is ${document.documentElement.scrollWidth} px wide`);
}
for (const image of document.images) {
  if (!image.complete || image.naturalWidth === 0) lost.push(`${image.alt} is empty`);
}
for (const element of document.querySelectorAll("h1, h2, p, img, td, th, dd")) {
  if (element.getBoundingClientRect().right > window.innerWidth && !element.closest(".scroll")) {
    lost.push(element.textContent || element.alt);
  }
}
return lost;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Yield a browser that shows a report with all its parts."""
    directory: Path = tmp_path_factory.mktemp("report")
    (directory / "audio").mkdir()
    for name in ("upstream", "cold", "warm"):
        soundfile.write(directory / "audio" / f"{name}.wav", np.zeros(240), 24_000)
    page = generate_warmup_report(results(), directory)
    with chromium() as driver:
        driver.get(page.as_uri())
        yield driver


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_nothing_is_cut_off(browser: webdriver.Chrome, size: tuple[int, int]) -> None:
    show(browser, size)
    assert browser.execute_script("return document.images.length") == 7
    assert browser.execute_script("return window.innerWidth") == size[0]
    assert browser.execute_script(_LOST) == []


def test_axe_finds_no_violation(browser: webdriver.Chrome) -> None:
    assert violations(browser, applied={"color-contrast", "image-alt", "landmark-one-main"}) == []
