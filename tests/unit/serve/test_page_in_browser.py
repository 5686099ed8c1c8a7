"""The forms of the page at `/` in Chromium, with answers that a server with a real model gives seldom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.serve.http import events
from tests.helpers.page import ENGLISH, MULTILINGUAL, TURBO, Site, done

from selenium.webdriver.common.by import By  # isort: skip - after the helper, which skips the tests without selenium

if TYPE_CHECKING:
    from chatterbox_prewarm.serve.http.schemas import ErrorFields

pytestmark = pytest.mark.programs

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

#: Return for each reason of a miss its text without the family, and the text that says how to mend it.
REASONS = """
return [...document.querySelectorAll("#reasons li")].map(
  (item) => [item.childNodes[1].textContent, item.querySelector(".next")?.textContent ?? null],
);
"""


def test_the_selected_language_stays_if_the_model_has_it(page: Site) -> None:
    page.open(models=[MULTILINGUAL])
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


def test_an_invalid_value_of_a_setting_that_the_model_lacks_does_not_block_the_form(page: Site) -> None:
    page.open(models=[TURBO, ENGLISH])
    page.wait(lambda: page.options("model") == ["turbo", "english"])
    page.driver.find_element(By.ID, "top_k").send_keys("-5")
    assert page.script("return document.getElementById('speak').checkValidity()") is False
    page.select("model").select_by_value("english")
    assert page.script("return document.getElementById('speak').checkValidity()") is True
    page.select("model").select_by_value("turbo")
    assert page.driver.find_element(By.ID, "top_k").is_enabled()
    assert not page.driver.find_element(By.ID, "exaggeration").is_enabled()


def test_the_names_of_the_probe_are_offered_if_the_list_of_voices_cannot_be_fetched(page: Site) -> None:
    """The names are known before the models."""
    page.open(models=None, voices=None)
    page.wait(lambda: page.options("voice") == ["fox", "owl"])
    page.models = [ENGLISH]
    page.refresh("fox", "owl")
    page.wait(lambda: page.options("model") == ["english"])
    assert page.options("voice") == ["fox", "owl"]


def test_each_miss_is_shown_with_the_command_that_mends_it(page: Site) -> None:
    """Neighbouring reasons with the same next step show it once, and nothing in a reason becomes an element."""
    changed = ["bytecode: a.py has changed", "bytecode: b.py has changed"]
    left_out = "numba: left out: <b>Numba</b>: baked with 1, here 2"
    late = "signal: computed 8000"
    page.open(
        startup={
            **page.startup,
            "misses": {"bytecode": 2, "numba": 1, "signal": 2},
            "reasons": [*changed, left_out, late, late],
            "next_steps": {
                **dict.fromkeys(changed, "bake again with `chatterbox-prewarm bake`, after <i>all</i> installations"),
                left_out: "bake here: `chatterbox-prewarm bake --device cpu`; `chatterbox-prewarm verify` says more",
            },
        }
    )
    page.wait(lambda: page.text("caches-note").startswith("5 misses"))
    assert page.script(REASONS) == [
        [" a.py has changed", None],
        [" b.py has changed", "To mend it: bake again with chatterbox-prewarm bake, after <i>all</i> installations"],
        [
            " left out: <b>Numba</b>: baked with 1, here 2",
            "To mend it: bake here: chatterbox-prewarm bake --device cpu; chatterbox-prewarm verify says more",
        ],
        [" computed 8000 (2 times)", None],
    ]
    codes = "return [...document.querySelectorAll('#reasons code')].map((code) => code.textContent)"
    assert page.script(codes) == [
        "chatterbox-prewarm bake",
        "chatterbox-prewarm bake --device cpu",
        "chatterbox-prewarm verify",
    ]


def test_a_second_click_on_record_starts_no_second_recording(page: Site) -> None:
    page.open()
    page.script(COUNT)
    page.script("const button = document.getElementById('record'); button.click(); button.click();")
    page.wait(lambda: page.text("record") == "Stop recording")
    page.script("document.getElementById('record').click()")
    page.wait(lambda: page.text("record") == "Record")
    assert page.script("return window.asked") == 1
    assert page.script("return window.tracks.map((track) => track.readyState)") == ["ended"]
    assert page.driver.find_element(By.ID, "record").is_enabled()


def test_the_page_says_what_is_missing_in_a_speech(page: Site) -> None:
    page.open(end=done(finish_reason="length", skipped_parts=2))
    page.wait(lambda: page.options("voice") == ["fox", "owl"])
    page.click("go")
    page.wait(lambda: page.text("speak-state").startswith("Parts of the text that could not be spoken: 2."))
    assert page.text("speak-state").endswith("The token limit ended a part of the speech, whose end may be missing.")
    page.end = done()
    page.click("go")
    page.wait(lambda: page.text("speak-state") == "")
    assert page.text("speak-error") == ""


def test_the_error_that_ends_a_speech_is_shown_with_the_audio_that_arrived(page: Site) -> None:
    failure: ErrorFields = {"message": "the worker died", "type": "server_error", "param": None, "code": "worker_lost"}
    page.open(end=events.failed(failure))
    page.wait(lambda: page.options("voice") == ["fox", "owl"])
    page.click("go")
    page.wait(lambda: page.text("speak-error"))
    assert page.text("speak-error") == "0.50 s of audio arrived. Then: the worker died"
    assert "real-time factor" in page.text("figures")
    page.end = b""
    page.click("go")
    page.wait(lambda: page.text("speak-error").endswith("The connection closed before the audio was complete."))
