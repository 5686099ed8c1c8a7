"""`generate_warmup_report`: write the results of a report as a page, with its charts as PNG files."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.executions import file_name
from chatterbox_prewarm.bench.report.claims import budgets, claims
from chatterbox_prewarm.bench.report.sections import sections
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.atomic_files import write_whole
from chatterbox_prewarm.system.fingerprint import ABSENT
from chatterbox_prewarm.system.paths import as_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def generate_warmup_report(results: Mapping[str, Any], output: str | Path = "warmup-report") -> Path:
    """Write `OUTPUT/report.html`, which contains its charts and audio, and each chart as a PNG file.

    Results that are not complete are marked as such on the page.

    Example:
        >>> results = run_warmup_benchmarks("report", device="cuda")
        >>> page = generate_warmup_report(results, "report")

    Args:
        results: the result of `run_warmup_benchmarks`, or the content of its JSON file.
        output: folder for the page. The audio is read from its folder `audio`, where `run_warmup_benchmarks` wrote it.

    Returns:
        the path of the page.

    Raises:
        BadInputError: the results are not those of `run_warmup_benchmarks`.
        ImportError: matplotlib or Jinja is missing; the extra `report` installs them.
    """
    if not isinstance(results, dict) or not {"plan", "steps", "complete"} <= results.keys():
        raise BadInputError(
            "these are not the results of a report", next_step="pass what run_warmup_benchmarks returned"
        )
    from chatterbox_prewarm.bench.report.charts import draw, save

    output = as_path(output, "the folder for the page")
    output.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, chart in draw(results["steps"]).items():
        path = output / f"{name}.png"
        save(chart, path)
        images[name] = _data_url(path, "image/png")
    page = output / "report.html"
    write_whole(page, _render(results, images, output / "audio"))
    return page


def _render(results: Mapping[str, Any], images: Mapping[str, str], audio: Path) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    steps, plan = results["steps"], results["plan"]
    environment = Environment(
        loader=PackageLoader("chatterbox_prewarm.bench.report", "."), autoescape=True, undefined=StrictUndefined
    )
    recordings = {path.stem: _data_url(path, "audio/wav") for path in sorted(audio.glob("*.wav"))}
    names = [name.removeprefix("quality: ").split(" / ") for name in steps if name.startswith("quality: ")]
    pairs = [[file_name(one) for one in pair] for pair in names if len(pair) == 2]
    machine = plan["machine"]
    return environment.get_template("page.html").render(
        machine=f"{machine['cpu']}, {machine['cores']} cores" if machine["gpu"] in {"", ABSENT} else machine["gpu"],
        complete=results["complete"],
        failed=results.get("failed", {}),
        tables={"Claims": claims(steps), "Budgets of a warm start": budgets(steps)},
        sections=sections(steps),
        charts=images,
        pairs=[pair for pair in pairs if all(name in recordings for name in pair)],
        audio=recordings,
        synthetic=plan["weights"]["synthetic"],
        conditions=_flat(plan),
    )


def _data_url(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _flat(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the plan as one level of names and texts."""
    flat = {}
    for name, value in plan.items():
        for inner, text in (value if isinstance(value, dict) else {"": value}).items():
            flat[f"{name} {inner}".strip()] = ", ".join(map(str, text)) if isinstance(text, list) else str(text)
    return flat
