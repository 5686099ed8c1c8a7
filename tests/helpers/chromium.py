"""Start Chromium without a window."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("selenium", reason="selenium is not installed (it is in the extra `dev`)")
from selenium import webdriver

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Yield a browser with a microphone that beeps, and with permission to use it."""
    browser, program = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or program is None:
        pytest.skip("there is no Chromium (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # Chromium has no sandbox for root, the user in most containers. /dev/shm of a container is small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--mute-audio"):
        options.add_argument(argument)
    for argument in ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program))
    try:
        yield driver
    finally:
        driver.quit()
