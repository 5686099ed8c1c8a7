"""The forms of the page at `/` in Chromium, with answers that a server with a real model gives seldom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from chatterbox_prewarm.serve.http.page import routes
from tests.helpers.chromium import chromium
from tests.helpers.http_server import serving

from selenium.webdriver.common.by import By  # isort: skip - after the helper, which skips the tests without selenium
from selenium.webdriver.support.ui import Select, WebDriverWait  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from selenium import webdriver
    from starlette.requests import Request

pytestmark = pytest.mark.programs

CONTROLS = {name: {"default": 1.0} for name in ("exaggeration", "cfg_weight", "temperature")}
ENGLISH = {"id": "english", "languages": {"en": "English"}, "language": "en", "controls": CONTROLS, "tags": []}
MULTILINGUAL = {**ENGLISH, "id": "multilingual", "languages": {"en": "English", "da": "Danish", "fr": "French"}}
TURBO = {**ENGLISH, "id": "turbo", "controls": {"temperature": {"default": 0.8}, "top_k": {"default": 1000}}}
VOICES = [{"id": name, "usable": True, "baked": True, "bytes": 1, "models": ["english"]} for name in ("fox", "owl")]
#: Record how many recordings began and how many tracks of the microphone are on. The permission takes a moment.
COUNT = """
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
window.asked = 0;
window.tracks = [];
navigator.mediaDevices.getUserMedia = async (wanted) => {
  window.asked += 1;
  await new Promise((resolve) => setTimeout(resolve, 500));
  const stream = await ask(wanted);
  window.tracks.push(...stream.getTracks());
  return stream;
};
"""


class Site:
    """The page in a browser, and the answers of its server, which a test can change."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.startup: dict[str, Any] = {"ready": True, "attached": True, "phase": "ready", "voices": ["fox", "owl"]}
        self.models: list[dict[str, Any]] | None = [ENGLISH]
        self.voices: list[dict[str, Any]] | None = VOICES
        answers: dict[str, Callable[[], dict[str, Any] | None]] = {
            "/startupz": lambda: self.startup,
            "/v1/models": lambda: None if self.models is None else {"data": self.models},
            "/v1/audio/voices": lambda: None if self.voices is None else {"data": self.voices},
        }
        self.app = Starlette(routes=[*routes(), *(Route(path, _answer(get)) for path, get in answers.items())])

    def script(self, text: str) -> Any:
        return self.driver.execute_script(text)

    def select(self, name: str) -> Select:
        return Select(self.driver.find_element(By.ID, name))

    def options(self, name: str) -> list[str]:
        return [str(option.get_property("value")) for option in self.select(name).options]

    def wait(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 30, poll_frequency=0.1).until(lambda _: condition())

    def refresh(self, *voices: str) -> None:
        """Let the page fetch voices and models again, as it does after a lost connection."""
        self.startup = {**self.startup, "voices": list(voices)}
        self.script("document.dispatchEvent(new Event('visibilitychange'))")


def _answer(get: Callable[[], Any]) -> Any:
    async def respond(_: Request) -> JSONResponse:
        found = get()
        return JSONResponse(found or {"error": {"message": "not now"}}, status_code=200 if found else 503)

    return respond


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


@pytest.fixture
def site(driver: webdriver.Chrome) -> Iterator[Callable[..., Site]]:
    """A function that opens the page of a server with these answers."""
    site = Site(driver)

    def open_page(**answers: Any) -> Site:
        for name, answer in answers.items():
            setattr(site, name, answer)
        driver.get(f"http://127.0.0.1:{port}/")
        site.wait(lambda: site.script("return document.getElementById('state').textContent") == "ready")
        return site

    with serving(site.app) as port:
        yield open_page
        driver.get("about:blank")


def test_the_selected_language_stays_if_the_model_has_it(site: Callable[..., Site]) -> None:
    page = site(models=[MULTILINGUAL])
    page.wait(lambda: page.options("language") == ["en", "da", "fr"])
    page.select("language").select_by_value("fr")
    page.models = [{**MULTILINGUAL, "languages": {"en": "English", "fr": "French"}}]
    page.refresh("fox")
    page.wait(lambda: page.options("language") == ["en", "fr"])
    assert page.script("return document.getElementById('language').value") == "fr"
    page.models = [MULTILINGUAL | {"languages": {"en": "English", "da": "Danish"}}]
    page.refresh("owl")
    page.wait(lambda: page.options("language") == ["en", "da"])
    assert page.script("return document.getElementById('language').value") == "en"


def test_an_invalid_value_of_a_setting_that_the_model_lacks_does_not_block_the_form(site: Callable[..., Site]) -> None:
    page = site(models=[TURBO, ENGLISH])
    page.wait(lambda: page.options("model") == ["turbo", "english"])
    page.driver.find_element(By.ID, "top_k").send_keys("-5")
    assert page.script("return document.getElementById('speak').checkValidity()") is False
    page.select("model").select_by_value("english")
    assert page.script("return document.getElementById('speak').checkValidity()") is True
    page.select("model").select_by_value("turbo")
    assert page.driver.find_element(By.ID, "top_k").is_enabled()
    assert not page.driver.find_element(By.ID, "exaggeration").is_enabled()


def test_the_names_of_the_probe_are_offered_if_the_list_of_voices_cannot_be_fetched(
    site: Callable[..., Site],
) -> None:
    """The names are known before the models."""
    page = site(models=None, voices=None)
    page.wait(lambda: page.options("voice") == ["fox", "owl"])
    page.models = [ENGLISH]
    page.refresh("fox", "owl")
    page.wait(lambda: page.options("model") == ["english"])
    assert page.options("voice") == ["fox", "owl"]


def test_a_second_click_on_record_starts_no_second_recording(site: Callable[..., Site]) -> None:
    page = site()
    page.script(COUNT)
    page.script("const button = document.getElementById('record'); button.click(); button.click();")
    page.wait(lambda: page.script("return document.getElementById('record').textContent") == "Stop recording")
    page.script("document.getElementById('record').click()")
    page.wait(lambda: page.script("return document.getElementById('record').textContent") == "Record")
    assert page.script("return window.asked") == 1
    assert page.script("return window.tracks.map((track) => track.readyState)") == ["ended"]
    assert page.driver.find_element(By.ID, "record").is_enabled()
