"""The page at `/` in Chromium with a real server: it shows the server's status and plays speech."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import soundfile

from tests.conftest import writable_copy
from tests.helpers.added_voices import voice
from tests.helpers.chromium import chromium
from tests.helpers.serving import Server
from tests.helpers.states import mark_cross_compiled

pytest.importorskip("selenium", reason="selenium is not installed (it is in the extra `dev`)")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from selenium import webdriver
    from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.programs

TEXT = "Hello there."
WAIT = 120.0


class Page:
    """Read the page as displayed, and the browser's logs."""

    def __init__(self, driver: webdriver.Chrome, server: Server) -> None:
        self.driver = driver
        self.server = server
        self.origin = f"http://127.0.0.1:{server.port}/"

    def open(self, *, width: int = 1280, height: int = 1000) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(self.origin)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).get_property("textContent"))

    def wait(self, condition: Callable[[], Any], seconds: float = WAIT) -> Any:
        return WebDriverWait(self.driver, seconds, poll_frequency=0.1).until(lambda _: condition())

    def wait_ready(self) -> None:
        self.wait(lambda: self.text("#state") == "ready")

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def figures(self) -> dict[str, str]:
        """Return the measurements of the last speech."""
        names, values = self.all("#figures dt"), self.all("#figures dd")
        return {name.text: value.text for name, value in zip(names, values, strict=True)}

    def requested(self) -> set[str]:
        """Return the URLs that the page requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}

    def complaints(self) -> list[str]:
        """Return the console messages since the last call, except those for the 503 of a probe during a start."""
        entries = [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]
        return [text for text in entries if not ("/startupz" in text and "503" in text)]


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium() as driver:
        yield driver


def wait_for_routes(server: Server) -> None:
    """Wait until the server listens."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        try:
            server.ask("GET", "/livez")
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(server.log.read_text())


@pytest.fixture(scope="module")
def states(
    driver: webdriver.Chrome, baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Page, list[str]]]:
    """Open the page while its server starts; yield it and the states that it showed until the server was ready."""
    directory = tmp_path_factory.mktemp("page")
    mark_cross_compiled(warm := writable_copy(baked, directory / "warm"))
    (directory / "voices").mkdir()
    server = Server(
        directory / "log",
        *("--warm", warm, "--weights", mini, "--cache", directory / "cache", "--policy", "require"),
        *("--max-new-tokens", "12", "--voices-dir", directory / "voices"),
    )
    page = Page(driver, server)
    states: list[str] = []
    try:
        wait_for_routes(server)
        deadline = time.monotonic() + WAIT
        page.open()
        state = ""
        while time.monotonic() < deadline and state != "ready":
            state, can_speak = page.script(
                "return [document.getElementById('state').textContent, !document.getElementById('go').disabled]"
            )
            states += [state] if state not in states else []
            assert can_speak == (state == "ready")
        yield page, states
    finally:
        server.end()


@pytest.fixture
def page(states: tuple[Page, list[str]]) -> Iterator[Page]:
    """Open the page again. After the test, check that it sent requests only to its server and logged no error."""
    page = states[0]
    page.open()
    page.wait_ready()
    page.wait(lambda: page.all("#voice option"))
    yield page
    # Chromium draws the controls of an audio element with images from data URLs.
    allowed = (page.origin, f"blob:{page.origin}", "data:")
    assert {url for url in page.requested() if not url.startswith(allowed)} == set()
    assert page.complaints() == []


def type_text(page: Page, text: str = TEXT) -> None:
    page.find("#text").clear()
    page.find("#text").send_keys(text)


def test_the_state_follows_a_starting_server_until_it_is_ready(
    states: tuple[Page, list[str]],
) -> None:
    page, seen = states
    assert page.text("#state") == "ready"
    assert any(state.startswith(("starting", "not ready: ")) for state in seen), seen


def test_a_state_that_was_compiled_without_its_gpu_is_shown(page: Page) -> None:
    assert "compiled without the GPU: unproven" in page.text("#facts")


def test_the_waterfall_has_a_bar_for_each_phase_and_the_marks_in_order(page: Page) -> None:
    _, status = page.server.status("/startupz")
    bars = page.all("#waterfall .bar")
    assert len(bars) == len(status["phases"])
    names = [cell.text for cell in page.all("#waterfall tbody tr:not(.mark) th")]
    assert names == [phase["name"] for phase in status["phases"]]
    assert [cell.text for cell in page.all("#waterfall .mark th")] == ["attached", "ready"]
    shown = [cell.text for cell in page.all("#waterfall tbody tr:not(.mark) td:last-child")]
    assert shown == [f"{phase['seconds']:.2f}" for phase in status["phases"]]
    longest = max(range(len(bars)), key=lambda index: status["phases"][index]["seconds"])
    widths = [bar.size["width"] for bar in bars]
    assert widths[longest] == max(widths)
    lane = page.find("#waterfall .lane")
    assert all(bar.location["x"] + bar.size["width"] <= lane.location["x"] + lane.size["width"] + 2 for bar in bars)


def test_the_caches_equal_those_of_startupz(page: Page) -> None:
    _, status = page.server.status("/startupz")
    families = {*status["loaded"], *status["hits"], *status["misses"]}
    rows = {row.get_attribute("data-family"): row for row in page.all("#caches tbody tr")}
    assert set(rows) == families
    for family, row in rows.items():
        shown = [cell.text.replace(",", "") for cell in row.find_elements(By.TAG_NAME, "td")]
        assert shown == [str(status[kind].get(family, 0)) for kind in ("loaded", "hits", "misses")]
    assert "No miss" in page.text("#caches-note")


def test_the_workers_equal_those_of_startupz(page: Page) -> None:
    _, status = page.server.status("/startupz")
    rows = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td") if cell.is_displayed()]
        for row in page.all("#workers tbody tr")
    ]
    assert [row[:2] for row in rows] == [[worker["device"], worker["phase"]] for worker in status["workers"]]
    assert all(row[4].endswith("B") for row in rows)


def test_typed_text_is_spoken_downloadable_and_measured(page: Page) -> None:
    type_text(page)
    Select(page.find("#voice")).select_by_visible_text("fox")
    page.find("#seed").send_keys("7")
    page.find("#go").click()
    page.wait(lambda: page.find("#player").is_displayed())
    length = page.wait(lambda: page.script("return document.getElementById('player').duration"))
    assert length > 0.2
    figures = page.figures()
    assert 0 < float(figures["first chunk"].split()[0]) <= float(figures["total time"].split()[0])
    assert float(figures["audio"].split()[0]) == pytest.approx(length, abs=0.01)
    assert float(figures["real-time factor"]) > 0
    assert figures["seed"] == "7"
    assert page.find("#download").get_attribute("download") == "fox-7.wav"
    page.wait(lambda: page.find("#go").is_enabled())
    assert page.text("#speak-error") == ""


def test_the_waveform_shows_the_speech_and_moves_the_player(page: Page) -> None:
    type_text(page)
    page.find("#go").click()
    page.wait(lambda: page.find("#wave").is_displayed())
    page.wait(lambda: page.find("#go").is_enabled())
    height, filled = page.script(WAVE)
    assert len(filled) > 100, "one column for each pixel"
    assert all(0 < one <= height for one in filled)
    assert max(filled) > min(filled), "the speech has loud and quiet parts"
    length = page.wait(lambda: page.script("return document.getElementById('player').duration"))
    page.find("#wave").click()  # in its middle
    assert page.script("return document.getElementById('player').currentTime") == pytest.approx(length / 2, rel=0.05)
    page.find("#wave").send_keys(Keys.ARROW_LEFT)
    assert page.script("return document.getElementById('player').currentTime") == pytest.approx(
        max(0.0, length / 2 - 1), abs=0.05
    )
    page.find("#wave").send_keys(Keys.ARROW_RIGHT)
    page.wait(lambda: float(page.find("#wave").get_attribute("aria-valuenow") or 0) > 0)


def test_without_a_seed_the_drawn_seed_is_shown(page: Page) -> None:
    type_text(page)
    page.find("#go").click()
    page.wait(lambda: page.find("#result").is_displayed())
    seed = page.figures()["seed"]
    assert 0 <= int(seed) < 2**32


def test_a_model_of_one_language_offers_no_choice_of_languages(page: Page) -> None:
    page.wait(lambda: page.all("#language option"))
    assert not page.find("#language-field").is_displayed()
    assert page.find("#language").get_property("value") == "en"


def test_the_error_of_the_server_is_shown(page: Page) -> None:
    page.script("document.getElementById('text').value = 'a '.repeat(40000)")
    page.find("#go").click()
    error = page.wait(lambda: page.text("#speak-error"))
    status, body = page.server.speak(input="a " * 40_000)
    assert status == 400
    assert json.loads(body)["error"]["message"].partition("\n")[0] in error
    assert "HTTP 400" in error
    assert page.find("#go").is_enabled()
    assert [text for text in page.complaints() if "400" not in text] == []


def test_stop_cancels_the_request(page: Page) -> None:
    type_text(page)
    assert not page.find("#stop").is_enabled()
    page.find("#go").click()
    page.wait(lambda: page.find("#stop").is_enabled(), 5)
    assert not page.find("#go").is_enabled()
    page.find("#stop").click()
    page.wait(lambda: page.text("#speak-state") == "Stopped.", 5)
    assert page.find("#go").is_enabled()
    page.wait(lambda: b"requests_in_flight 0.0" in page.server.ask("GET", "/metrics")[1])


def test_a_voice_is_added_from_a_file_previewed_and_deleted(page: Page, clip: Path) -> None:
    page.wait(lambda: page.all("[data-voice=fox]"))
    assert page.find("[data-voice=fox]").text.split()[1] == "baked"
    assert not page.all("[data-voice=fox] [aria-label='Delete fox']")
    page.find("#name").send_keys("visitor")
    page.find("#file").send_keys(str(clip))
    page.find("#add-button").click()
    page.wait(lambda: page.text("#voices-state") == "visitor was added." or page.text("#voices-error"))
    assert page.text("#voices-error") == ""
    assert "visitor" in [option.text for option in Select(page.find("#voice")).options]
    page.find("[aria-label='Preview visitor']").click()
    page.wait(lambda: page.text("#voices-state") == "This is visitor." or page.text("#voices-error"))
    assert page.script("return document.getElementById('preview').duration") > 0.2
    page.find("[aria-label='Delete visitor']").click()
    page.driver.switch_to.alert.accept()
    page.wait(lambda: page.text("#voices-state") == "visitor was deleted." or page.text("#voices-error"))
    assert not page.all("[data-voice=visitor]")
    assert "visitor" not in page.server.status("/startupz")[1]["voices"]


def test_a_voice_is_added_from_a_recording(page: Page) -> None:
    page.wait(lambda: page.all("[data-voice=fox]"))
    page.find("#record").click()
    page.wait(lambda: page.text("#record") == "Stop recording")
    page.wait(lambda: page.text("#voices-state") == "Recording: 2 s.")
    page.find("#record").click()
    page.wait(lambda: page.text("#voices-state").startswith("Recorded ") or page.text("#voices-error"))
    assert page.text("#voices-error") == ""
    assert page.text("#record") == "Record"
    name, content = page.script(
        "const file = document.getElementById('file').files[0];"
        "return file.arrayBuffer().then((bytes) => [file.name, [...new Uint8Array(bytes)]]);"
    )
    assert name == "recording.wav"
    samples, rate = soundfile.read(io.BytesIO(bytes(content)))
    assert rate == 24_000
    assert samples.ndim == 1
    assert len(samples) / rate == pytest.approx(2, abs=1)
    assert abs(samples).max() > 0.01, "the microphone beeps"
    page.find("#name").send_keys("me")
    page.find("#add-button").click()
    page.wait(lambda: page.text("#voices-state") == "me was added." or page.text("#voices-error"))
    assert page.text("#voices-error") == ""
    page.find("[aria-label='Delete me']").click()
    page.driver.switch_to.alert.accept()
    page.wait(lambda: page.text("#voices-state") == "me was deleted." or page.text("#voices-error"))


def test_a_microphone_that_is_refused_is_reported(page: Page) -> None:
    page.script(
        "navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', 'NotAllowedError'));"
    )
    page.find("#record").click()
    page.wait(lambda: "does not allow this page to use the microphone" in page.text("#voices-error"))
    assert page.text("#record") == "Record"


def test_an_unusable_voice_is_not_offered_and_its_reason_is_shown(page: Page) -> None:
    directory = page.server.log.parent / "voices"
    (directory / "old.safetensors").write_bytes(voice(weights="sha256:" + "9" * 64))
    try:
        page.open()
        page.wait(lambda: page.all("[data-voice=old]"))
        assert "cannot be used: " in page.text("[data-voice=old]")
        assert "checkpoint" in page.text("[data-voice=old]")
        assert [option.text for option in Select(page.find("#voice")).options] == ["default", "fox"]
        assert not page.all("[aria-label='Preview old']")
        assert page.all("[aria-label='Delete old']")
    finally:
        (directory / "old.safetensors").unlink()


def test_the_page_works_with_the_keyboard_only(page: Page) -> None:
    page.script("document.getElementById('text').value = ''")
    reached: list[str] = []
    for _ in range(40):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        name = page.script("return document.activeElement.id")
        outline = page.script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{name} does not show the keyboard focus"
        reached.append(name)
        if name == "text":
            page.driver.switch_to.active_element.send_keys(TEXT)
        if name == "go":
            break
    order = ["text", "voice", "seed", "exaggeration", "cfg_weight", "temperature", "look_ahead", "go"]
    assert reached[-len(order) :] == order
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.wait(lambda: page.find("#result").is_displayed())
    page.wait(lambda: page.find("#go").is_enabled())
    page.script("document.getElementById('result').hidden = true")
    page.find("#text").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.find("#result").is_displayed())


@pytest.mark.parametrize("width", [320, 400, 1000, 1600])
def test_the_page_does_not_scroll_horizontally(page: Page, width: int) -> None:
    page.open(width=width, height=800)
    page.wait_ready()
    page.wait(lambda: page.all("#waterfall .bar") and page.all("#voices tbody tr"))
    seen = page.script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    assert seen[0] == seen[1] > width - 20, "the difference is the vertical scroll bar"


def test_every_control_has_a_name(page: Page) -> None:
    controls = page.all("input, select, textarea, button, audio, canvas, a")
    assert len(controls) > 15
    for control in controls:
        shown = control.is_displayed()
        assert not shown or control.accessible_name, control.get_attribute("outerHTML")


def test_a_replaced_worker_is_shown(page: Page) -> None:
    os.kill(page.server.worker(), signal.SIGKILL)
    page.wait(lambda: "restarts1" in page.text("#facts"))
    page.wait_ready()
    assert "1 restart" in page.text("#start-note")


def test_a_browser_with_the_token_shows_the_page(
    driver: webdriver.Chrome, baked: Path, mini: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    server = Server(
        tmp_path / "log",
        *("--warm", baked, "--weights", mini, "--cache", tmp_path / "cache", "--token-file", token),
    )
    page = Page(driver, server)
    try:
        wait_for_routes(server)
        page.origin = f"http://user:{token.read_text()}@127.0.0.1:{server.port}/"
        page.open()
        page.wait(lambda: page.all("#waterfall .bar"))
        page.wait(lambda: "warm state" in page.text("#facts"))
        assert "without the GPU" not in page.text("#facts")
        assert page.complaints() == []
    finally:
        server.end()


#: Return the height of the waveform in pixels, and how many pixels of each column are filled.
WAVE = """
const canvas = document.getElementById("wave");
const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
const opaque = (x, y) => data[4 * (y * width + x) + 3] > 0;
const filled = (x) => Array.from({ length: height }, (_, y) => opaque(x, y)).filter(Boolean).length;
return [height, Array.from({ length: width }, (_, x) => filled(x))];
"""
