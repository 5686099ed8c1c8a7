"""The page at `/` in a browser, with a server whose answers a test chooses."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatterbox_prewarm.serve.http import events
from chatterbox_prewarm.serve.http.page import routes
from tests.helpers.http_server import serving

pytest.importorskip("selenium", reason="selenium is not installed (it is in the extra `dev`)")
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from selenium import webdriver
    from starlette.requests import Request

    from chatterbox_prewarm.serve.http.schemas import FinishReason

_CONTROLS = {name: {"default": 1.0} for name in ("exaggeration", "cfg_weight", "temperature")}
ENGLISH = {"id": "english", "languages": {"en": "English"}, "language": "en", "controls": _CONTROLS, "tags": []}
MULTILINGUAL = {**ENGLISH, "id": "multilingual", "languages": {"en": "English", "da": "Danish", "fr": "French"}}
TURBO = {**ENGLISH, "id": "turbo", "controls": {"temperature": {"default": 0.8}, "top_k": {"default": 1000}}}
VOICES = [{"id": name, "usable": True, "baked": True, "bytes": 1, "models": ["english"]} for name in ("fox", "owl")]
#: Half a second of a square wave: 16-bit samples at 24 kHz.
_SPEECH = (b"\x00\x20" * 60 + b"\x00\xe0" * 60) * 100


class Site:
    """The page in a browser, and the answers of its server, which a test can change."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.startup: dict[str, Any] = {"ready": True, "attached": True, "phase": "ready", "voices": ["fox", "owl"]}
        self.models: list[dict[str, Any]] | None = [ENGLISH]
        self.voices: list[dict[str, Any]] | None = VOICES
        self.speech: bytes | None = _SPEECH
        self.end = done()
        answers: dict[str, Callable[[], dict[str, Any] | None]] = {
            "/startupz": lambda: self.startup,
            "/v1/models": lambda: None if self.models is None else {"data": self.models},
            "/v1/audio/voices": lambda: None if self.voices is None else {"data": self.voices},
        }
        speech = Route("/v1/audio/speech", self._speak, methods=["POST"])
        paths = [Route(path, _answer(get)) for path, get in answers.items()]
        self._app = Starlette(routes=[*routes(), *paths, speech])
        self._port = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Serve the page and the answers."""
        with serving(self._app) as self._port:
            yield
            self.driver.get("about:blank")

    def open(self, headline: str = "ready", **answers: Any) -> None:
        """Open the page with these answers, and wait until it shows this state of the server."""
        for name, answer in answers.items():
            setattr(self, name, answer)
        self.driver.get(f"http://127.0.0.1:{self._port}/")
        self.wait(lambda: self.text("state") == headline)

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def text(self, name: str) -> str:
        return str(self.script("return document.getElementById(arguments[0]).textContent", name))

    def click(self, name: str) -> None:
        self.driver.find_element(By.ID, name).click()

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

    async def _speak(self, _: Request) -> Response:
        if self.speech is None:
            return _refusal()
        return Response(events.delta(self.speech) + self.end, media_type=events.MEDIA_TYPE)


def done(*, finish_reason: FinishReason = "stop", skipped_parts: int = 0) -> bytes:
    """Return the last event of a speech."""
    return events.done(input_tokens=5, output_tokens=12, finish_reason=finish_reason, skipped_parts=skipped_parts)


def _answer(get: Callable[[], Any]) -> Any:
    async def respond(_: Request) -> Response:
        found = get()
        return JSONResponse(found) if found else _refusal()

    return respond


def _refusal() -> JSONResponse:
    return JSONResponse({"error": {"message": "not now"}}, status_code=503)
