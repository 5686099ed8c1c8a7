"""`bench startup`: start each system in fresh processes and compare the medians of one run.

A start with a hot page cache that still read more than `_HOT_LIMIT` bytes from storage is not part of the medians. In
the report, its field `apart` is true.
"""

from __future__ import annotations

import contextlib
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.room import check_memory
from chatterbox_prewarm.bench.starts import (
    drop_page_cache,
    settle,
    setup,
    time_server,
    time_torch_import,
    time_upstream,
)
from chatterbox_prewarm.bench.upstream import STEADY_REQUESTS
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.reference_clip import reference_clip
from chatterbox_prewarm.start.save import REFERENCE_TOKENS
from chatterbox_prewarm.state.state import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SYSTEMS = ("torch", "upstream", "cold", "warm")
_TITLES = {
    "torch": "import torch",
    "upstream": "upstream unchanged",
    "cold": "ours, cold",
    "warm": "ours, warm",
}
_HOT_LIMIT = 60_000_000
#: Rows of the table: key of the figure, its title, what to divide it by, and decimal places.
_ROWS = (
    ("imported", "imports done", 1, 2),
    ("loaded", "weights loaded", 1, 2),
    ("attached", "attached", 1, 2),
    ("ready", "ready", 1, 2),
    ("first_audio", "first audio", 1, 2),
    ("first_request", "first request", 1, 2),
    ("steady_request", "steady request", 1, 2),
    ("new_length_request", "  of a new length", 1, 2),
    ("modules", "modules at ready", 1, 0),
    ("resident_bytes", "peak memory, MB", 1_000_000, 0),
)


def check_systems(systems: Sequence[str]) -> None:
    """Check the names of systems.

    Raises:
        BadInputError: a system is unknown.
    """
    if unknown := set(systems) - set(SYSTEMS):
        raise BadInputError(f"unknown system {min(unknown)!r}", next_step=f"choose from {', '.join(SYSTEMS)}")


def measure_starts(  # noqa: PLR0913 - the public API: keywords are easier to use than an options object
    weights: Path,
    warm: Path,
    *,
    rounds: int = 3,
    cold_pages: bool = False,
    systems: Sequence[str] = SYSTEMS,
    device: str = "cpu",
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None] = lambda _: None,
    hello: Path | None = None,
    requests: int = STEADY_REQUESTS,
) -> dict[str, Any]:
    """Measure starts of bare torch, of upstream, and of our server with and without the warm state.

    Example:
        >>> report = measure_starts(Path("weights"), Path("warm"), rounds=3, say=print)
        >>> report["ratios"]["hot"]["warm attached / upstream attached"]
        0.14

    Args:
        weights: checkpoint that all systems load.
        warm: warm state that was baked for it.
        rounds: fresh processes of each system with a hot page cache. The systems alternate.
        cold_pages: add a round in which the page cache is dropped before each start.
        systems: names from `SYSTEMS`.
        device: device of all systems. The state must be baked for it.
        say: called with one line for each start.
        save: called with the report before the first start and after each one. Its `complete` is false until the last.
        hello: path of a WAV file for the first sentence of the warm server; None to write no file.
        requests: requests of each process after its first one. With 1, only the warm server gets a second request.

    Returns:
        the report: `complete`, machine, all runs, medians and ratios.

    Raises:
        BadInputError: a system is unknown, or there is too little memory.
    """
    check_systems(systems)
    State.read(warm)  # report a damaged state before the first start
    check_memory(weights, purpose="a start")
    conditions = {**setup(weights, warm, device), "tokens": REFERENCE_TOKENS}
    planned = [
        (pages, number, count, system)
        for pages, count in (("hot", rounds), ("cold", int(cold_pages)))
        for number in range(1, count + 1)
        for system in systems
    ]
    runs: list[dict[str, Any]] = []

    def report() -> dict[str, Any]:
        return {"complete": len(runs) == len(planned), **conditions, **summarize(runs)}

    save(report())  # an older report must not look like the result of this run
    with reference_clip() as clip:
        measure = start_functions(weights, warm, clip, device, hello=hello, requests=requests)
        for pages, number, count, system in planned:
            settle(weights, warm) if pages == "hot" else drop_page_cache()
            say(f"{_TITLES[system]}, page cache {pages}, {number} of {count}")
            runs.append(label_run(measure[system](), system, pages))
            save(report())
    return report()


def start_functions(
    weights: Path,
    warm: Path,
    clip: Path,
    device: str,
    *,
    hello: Path | None = None,
    requests: int = STEADY_REQUESTS,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return for each system a function that measures one start; see `measure_starts` for the arguments."""
    others = requests if requests > 1 else 0
    return {
        "torch": time_torch_import,
        "upstream": partial(time_upstream, weights, clip, device, requests=others),
        "cold": partial(time_server, weights, warm, device, clip=clip, requests=others),
        "warm": partial(time_server, weights, warm, device, hello=hello, requests=requests),
    }


def label_run(result: dict[str, Any], system: str, pages: str) -> dict[str, Any]:
    """Add the system, the state of the page cache, and whether the run is left out of the medians."""
    apart = pages == "hot" and result.get("read_bytes", 0) > _HOT_LIMIT
    return {"system": system, "pages": pages, **result, "apart": apart}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute medians for each system and page-cache state, and the ratios between systems."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for pages in ("hot", "cold"):
        medians[pages] = {}
        for system in SYSTEMS:
            matching = [run for run in runs if run["system"] == system and run["pages"] == pages]
            kept = [run for run in matching if not run["apart"]] or matching
            names = {name for run in kept for name, value in run.items() if isinstance(value, float)}
            if kept:
                medians[pages][system] = {
                    name: round(statistics.median(run[name] for run in kept if name in run), 3)
                    for name in sorted(names)
                }
    return {
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
    # Requests are compared within one process, because the speed of a shared machine changes between processes.
    paired = {
        "first request / steady request, upstream": ("upstream", "first_to_steady"),
        "first request / steady request, warm": ("warm", "first_to_steady"),
        "attached to ready / steady request, warm": ("warm", "ready_to_steady"),
        "first audio / (attached + steady request), warm": ("warm", "first_to_sum"),
        "first chunk of a first stream / of later streams, warm": ("warm", "first_chunk_to_steady"),
    }
    ratios = {
        title: medians[system][name] for title, (system, name) in paired.items() if name in medians.get(system, {})
    }
    for title, ((system, name), (base, base_name)) in pairs.items():
        with contextlib.suppress(KeyError):
            ratios[title] = round(medians[system][name] / medians[base][base_name], 3)
    return ratios


def table(report: dict[str, Any]) -> str:
    """Format the report: moments in seconds since exec, requests in seconds, then the ratios."""
    lines = []
    for pages, medians in report["medians"].items():
        if not medians:
            continue
        lines.append(f"page cache {pages}, seconds since exec (medians)")
        lines.append("  " + " " * 18 + "".join(f"{_TITLES[system]:>20}" for system in medians))
        for name, title, unit, digits in _ROWS:
            cells = [medians[system].get(name) for system in medians]
            if any(cell is not None for cell in cells):
                shown = "".join(f"{'' if cell is None else f'{cell / unit:.{digits}f}':>20}" for cell in cells)
                lines.append(f"  {title:<18}{shown}")
        lines.extend(
            f"  every run of {_TITLES[system]!r} read more than {_HOT_LIMIT // 1_000_000} MB from storage"
            for system in medians
            if all(run["apart"] for run in report["runs"] if (run["system"], run["pages"]) == (system, pages))
        )
        lines.extend(f"  {title}: {ratio}" for title, ratio in report["ratios"][pages].items())
    return "\n".join(lines)
