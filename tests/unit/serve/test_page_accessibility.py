"""The page at `/` has no violation that axe-core finds, in Chromium, in each of its states."""

from __future__ import annotations

import pytest

from tests.helpers.axe import violations
from tests.helpers.page import ENGLISH, MULTILINGUAL, TURBO, VOICES, Site

pytestmark = pytest.mark.programs

PHASES = [
    {"name": name, "start": start, "seconds": seconds}
    for name, start, seconds in (("prepare", 0.1, 1.2), ("import", 1.3, 3.2), ("weights", 4.5, 0.3))
]
STARTING = {"ready": False, "attached": False, "phase": "conditionals", "phases": PHASES, "marks": {}}
GONE = {**STARTING, "phase": "worker gone", "restarts": 2}
WORKER = {"phase": "ready", "busy": False, "restarts": 0, "rss_bytes": 3.4e9, "vram_bytes": 5e9}
#: Every table is shown, and the table of the workers has all its columns.
READY = {
    "ready": True,
    "attached": True,
    "phase": "ready",
    "phases": PHASES,
    "marks": {"attached": 5.1, "ready": 6.0},
    "profile": "aot",
    "state": "cpu-x86_64-torch2.6.0-aot-c5f5cd4abedf",
    "cross_compiled": True,
    "restarts": 1,
    "loaded": {"aot": 12, "bytecode": 830, "conditionals": 1},
    "hits": {"aot": 11, "bytecode": 830},
    "misses": {"conditionals": 1},
    "reasons": ["conditionals: the voice 'owl' was made at start"],
    "next_steps": {
        "conditionals: the voice 'owl' was made at start": (
            "bake it with these weights: `chatterbox-prewarm bake --voice owl=owl.wav`"
        )
    },
    "model": "turbo",
    "models": {"turbo": {}, "multilingual": {}},
    "voices": ["fox", "owl"],
    "workers": [
        {**WORKER, "device": "cuda:0", "model": "turbo", "busy": True, "voices": 1, "voice_bytes": 2e6},
        {**WORKER, "device": "cuda:1", "model": "multilingual", "phase": "failed", "reason": "out of memory"},
    ],
}
ADDED = {
    "id": "visitor",
    "usable": True,
    "baked": False,
    "bytes": 250_000,
    "created": 1_764_000_000,
    "models": ["english"],
    "reason": "it has no tokens for turbo",
}
BROKEN = {**ADDED, "id": "old", "usable": False, "models": [], "reason": "it was made for another checkpoint"}


def check(page: Site) -> None:
    """Assert that the page, as it is shown now, has no violation in any size and colour scheme."""
    assert violations(page.driver, applied={"color-contrast", "label", "target-size"}) == []


def test_a_start(page: Site) -> None:
    page.open("starting: conditionals", startup=STARTING)
    check(page)


def test_a_lost_worker(page: Site) -> None:
    page.open("not ready: the worker ended, and the server starts a new one", startup=GONE)
    check(page)


def test_a_ready_server_with_all_tables(page: Site) -> None:
    page.open(startup=READY, voices=VOICES)
    page.wait(lambda: page.options("voice") == ["fox", "owl"])
    check(page)


def test_several_models_with_tags_and_languages(page: Site) -> None:
    turbo = {**TURBO, "tags": ["[laugh]", "[sigh]"]}
    page.open(startup=READY, models=[turbo, MULTILINGUAL, ENGLISH])
    page.wait(lambda: page.options("model") == ["turbo", "multilingual", "english"])
    check(page)
    page.select("model").select_by_value("multilingual")
    page.wait(lambda: page.options("language") == ["en", "da", "fr"])
    check(page)


def test_added_voices_and_a_recording(page: Site) -> None:
    page.open(voices=[*VOICES, ADDED, BROKEN])
    page.wait(lambda: "cannot be used" in page.text("voices"))
    page.click("record")
    page.wait(lambda: page.text("voices-state") == "Recording: 1 s.")
    check(page)
    page.click("record")
    page.wait(lambda: page.text("voices-state").startswith("Recorded "))
    check(page)


def test_played_speech(page: Site) -> None:
    page.open()
    page.wait(lambda: page.options("voice") == ["fox", "owl"])
    page.click("go")
    page.wait(lambda: "real-time factor" in page.text("figures"))
    check(page)


def test_refused_requests(page: Site) -> None:
    page.open(voices=None, speech=None)
    page.wait(lambda: page.text("voices-error"))
    page.click("go")
    page.wait(lambda: page.text("speak-error"))
    check(page)


def test_the_check_finds_a_list_without_a_label(page: Site) -> None:
    page.open()
    page.script("document.querySelector('label[for=voice]').remove()")
    assert {found.split(": ")[1] for found in violations(page.driver, applied=())} == {"select-name"}
