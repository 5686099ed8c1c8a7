"""Draw the pictures of docs/ that show results and the page: `python docs/pictures.py`.

The charts come from recorded results, with the code that draws the charts of a report. The page at `/` is shown by
Chromium, with chosen answers of a server. Its start is a recorded run; the workers and voices are an example. Needs the
extras `report` and `dev`, and Chromium with its driver.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
#: The recorded report, and the charts of it that are shown.
REPORT, CHARTS = "report-cpu.json", ("starts", "ablation")
#: The recorded start that the page shows.
START = "startup-cpu-demo.json"
#: Width of the window in pixels.
WIDTH = 1280
#: The sizes of the voices of a server with the models English and Turbo, by voice; all are baked.
VOICES = {"default": 104_000, "fox": 110_000, "owl": 108_000}


def draw_charts() -> None:
    """Write the charts of `CHARTS`."""
    from chatterbox_prewarm.bench.report.charts import draw, save

    charts = draw(json.loads((RESULTS / REPORT).read_text())["steps"])
    for name in CHARTS:
        save(charts[name], DOCS / f"{name}.png")


def status() -> dict[str, Any]:
    """Return the answer of `/startupz` after the recorded warm start, with an example of its workers."""
    runs = json.loads((RESULTS / START).read_text())["runs"]
    (run,) = [run for run in runs if run["system"] == "warm"]
    worker = {"device": "cpu", "phase": "ready", "busy": False, "restarts": 0, "rss_bytes": run["resident_bytes"]}
    return {
        "ready": True,
        "attached": True,
        "phase": "ready",
        "model": "english",
        "models": {"english": True, "turbo": True},
        "voices": list(VOICES),
        "restarts": 0,
        "workers": [{**worker, "model": "english"}, {**worker, "model": "turbo", "rss_bytes": 2.9e9}],
        "phases": run["phases"],
        "marks": {"attached": run["attached"], "ready": run["ready"]},
        "loaded": run["hits"],  # not recorded; such a start uses what it loads
        "hits": run["hits"],
        "misses": run["misses"],
        "reasons": [],
        "next_steps": {},
        "profile": "aot",
        "state": "cpu-x86_64-torch2.6.0-aot-c5f5cd4abedf",
    }


def take_page() -> None:
    """Write `page.png`: the complete page in a wide window, in the light colours."""
    from tests.helpers.chromium import chromium
    from tests.helpers.page import ENGLISH, TURBO, Site

    defaults = {"exaggeration": None, "cfg_weight": 0.5, "temperature": 0.8}
    controls = {name: {"default": default} for name, default in defaults.items()}
    models = [{**ENGLISH, "controls": controls}, {**TURBO, "tags": ["[laugh]", "[sigh]", "[cough]"]}]
    voices = [
        {"id": name, "usable": True, "baked": True, "bytes": size, "models": ["english", "turbo"]}
        for name, size in VOICES.items()
    ]
    with chromium() as driver:
        site = Site(driver)
        with site.serving():
            resize(driver, 1000)
            site.open(startup=status(), models=models, voices=voices)
            site.wait(lambda: site.options("voice") == list(VOICES) and site.options("model") == ["english", "turbo"])
            resize(driver, int(site.script("return document.documentElement.offsetHeight")))
            # Otherwise, each run would give a different file.
            site.script("document.getElementById('updated').textContent = 'Updated at 12:00:00, every 5 s.'")
            driver.save_screenshot(str(DOCS / "page.png"))


def resize(driver: Any, height: int) -> None:
    """Set the height of the window in pixels, and the light colours."""
    size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    draw_charts()
    take_page()
