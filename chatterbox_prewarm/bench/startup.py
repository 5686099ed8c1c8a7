"""bench startup: fresh processes in turn, their phases from one event log, medians and ratios of one run.

A run that read more than `_HOT_LIMIT` bytes from storage although the page cache was to be hot is set apart.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bake.save import REFERENCE_TOKENS
from chatterbox_prewarm.bench.starts import Starts, checkpoint, drop_page_cache, machine, settle, versions
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.warmup.inputs import reference_clip
from chatterbox_prewarm.state.manifest import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SYSTEMS = ("torch", "upstream", "cold", "warm")
_TITLES = {
    "torch": "import torch",
    "upstream": "upstream as it is",
    "cold": "ours, cold",
    "warm": "ours, warm",
}
_HOT_LIMIT = 60_000_000
#: The rows of the table: a figure of the results and what it is called.
_ROWS = (
    ("imported", "imports done"),
    ("loaded", "weights in place"),
    ("attached", "attached"),
    ("ready", "ready"),
    ("first_audio", "first audio"),
    ("first_request", "first request"),
    ("steady_request", "steady request"),
    ("new_length_request", "  of a new length"),
)


def benchmark_warmup_effectiveness(
    weights: Path,
    warm: Path,
    *,
    rounds: int = 3,
    cold_pages: bool = False,
    systems: Sequence[str] = SYSTEMS,
    device: str = "cpu",
    say: Callable[[str], None],
    hello: Path | None = None,
) -> dict[str, Any]:
    """Measure starts: of bare torch, of upstream as it is, and of ours without and with the warm state.

    Args:
        weights: the checkpoint all systems load.
        warm: a warm state baked for it.
        rounds: fresh processes of each system with a hot page cache, the systems in turn.
        cold_pages: measure one more round with the page cache dropped before each start.
        systems: which of `SYSTEMS`.
        device: of all systems; the state must be baked for it.
        say: called with a line for each start.
        hello: where to keep the first sentence of the warm server, a WAV file.

    Returns:
        the report: machine, every run, medians of the hot ones, and ratios.
    """
    if unknown := set(systems) - set(SYSTEMS):
        raise BadInputError(f"there is no system {min(unknown)!r}", next_step=f"choose from {', '.join(SYSTEMS)}")
    read_manifest(warm)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-bench-") as scratch, reference_clip() as clip:
        starts = Starts(weights=weights, clip=clip, scratch=Path(scratch), device=device)
        measure: dict[str, Callable[[], dict[str, Any]]] = {
            "torch": starts.torch,
            "upstream": starts.upstream,
            "cold": lambda: starts.ours(warm, policy="off"),
            "warm": lambda: starts.ours(warm, policy="require", hello=hello),
        }
        for pages, count in (("hot", rounds), ("cold", int(cold_pages))):
            for number in range(1, count + 1):
                for system in systems:
                    settle(weights, warm) if pages == "hot" else drop_page_cache()
                    say(f"{_TITLES[system]}, page cache {pages}, {number} of {count}")
                    result = {"system": system, "pages": pages, **measure[system]()}
                    result["apart"] = pages == "hot" and result.get("read_bytes", 0) > _HOT_LIMIT
                    runs.append(result)
    return summarize(runs, weights=weights, warm=warm, device=device)


def summarize(runs: list[dict[str, Any]], *, weights: Path, warm: Path, device: str) -> dict[str, Any]:
    """Medians per system and page-cache state, and the ratios that the budgets name."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for pages in ("hot", "cold"):
        medians[pages] = {}
        for system in SYSTEMS:
            mine = [run for run in runs if run["system"] == system and run["pages"] == pages]
            kept = [run for run in mine if not run["apart"]] or mine
            names = {name for run in kept for name, value in run.items() if isinstance(value, float)}
            if kept:
                medians[pages][system] = {
                    name: round(statistics.median(run[name] for run in kept if name in run), 3)
                    for name in sorted(names)
                }
    return {
        "machine": machine(),
        "versions": versions(),
        "device": device,
        "weights": checkpoint(weights),
        "set_digest": read_manifest(warm).set_digest,
        "tokens": REFERENCE_TOKENS,
        "runs": runs,
        "medians": medians,
        "ratios": {pages: _ratios(medians[pages]) for pages in medians if medians[pages]},
    }


def _ratios(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    pairs = {
        "warm attached / upstream attached": (("warm", "attached"), ("upstream", "attached")),
        "warm attached / import torch": (("warm", "attached"), ("torch", "imported")),
        "warm first audio / upstream first audio": (("warm", "first_audio"), ("upstream", "first_audio")),
        "cold attached / upstream attached": (("cold", "attached"), ("upstream", "attached")),
    }
    # Two requests of one process are compared within each run: between runs a shared machine changes its speed.
    paired = {
        "first request / steady request, upstream": ("upstream", "first_to_steady"),
        "first request / steady request, warm": ("warm", "first_to_steady"),
        "attached to ready / steady request, warm": ("warm", "ready_to_steady"),
    }
    ratios = {
        title: medians[system][name] for title, (system, name) in paired.items() if name in medians.get(system, {})
    }
    for title, ((system, name), (base, base_name)) in pairs.items():
        with contextlib.suppress(KeyError):
            ratios[title] = round(medians[system][name] / medians[base][base_name], 3)
    return ratios


def table(report: dict[str, Any]) -> str:
    """The report for people: moments in seconds since exec, requests in seconds, then the ratios."""
    lines = []
    for pages, medians in report["medians"].items():
        if not medians:
            continue
        lines.append(f"page cache {pages}, seconds since exec (medians)")
        lines.append("  " + " " * 18 + "".join(f"{_TITLES[system]:>20}" for system in medians))
        for name, title in _ROWS:
            cells = [medians[system].get(name) for system in medians]
            if any(cell is not None for cell in cells):
                shown = "".join(f"{'' if cell is None else f'{cell:.2f}':>20}" for cell in cells)
                lines.append(f"  {title:<18}{shown}")
        lines.extend(
            f"  every run of {_TITLES[system]!r} read more than {_HOT_LIMIT // 1_000_000} MB from storage"
            for system in medians
            if all(run["apart"] for run in report["runs"] if (run["system"], run["pages"]) == (system, pages))
        )
        lines.extend(f"  {title}: {ratio}" for title, ratio in report["ratios"][pages].items())
    return "\n".join(lines)
