"""Fixtures of the tests that open the page at `/` in Chromium."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selenium import webdriver

    from tests.helpers.page import Site


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    from tests.helpers.chromium import chromium

    with chromium() as driver:
        yield driver


@pytest.fixture
def page(driver: webdriver.Chrome) -> Iterator[Site]:
    from tests.helpers.page import Site

    site = Site(driver)
    with site.serving():
        yield site
