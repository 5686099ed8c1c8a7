"""bench startup: fresh processes in turn, their phases from one event log, medians and ratios of one run.

Before each start with a hot page cache the files are read through, and each result carries the bytes that it still
read from storage; a run that read more than `_HOT_LIMIT` is set apart. Upstream and "ours cold" begin with an empty
Numba cache, as in a fresh container, and prepare their voice from a clip.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm import manifest as manifests
from chatterbox_prewarm.bench.server import measured_server
from chatterbox_prewarm.bench.upstream import STEADY_REQUESTS, parse_read_bytes
from chatterbox_prewarm.errors import BadInputError, ModelError, from_os_error
from chatterbox_prewarm.fingerprint import read_fingerprint
from chatterbox_prewarm.process import run as run_process
from chatterbox_prewarm.prove import parse_trial
from chatterbox_prewarm.save import REFERENCE_TOKENS
from chatterbox_prewarm.warmup.inputs import SHORT_TEXT, reference_clip
from chatterbox_prewarm.warmup.metrics import now
from chatterbox_prewarm.weights import read_record

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


def run(
    weights: Path,
    warm: Path,
    *,
    rounds: int = 3,
    cold_pages: bool = False,
    systems: Sequence[str] = SYSTEMS,
    say: Callable[[str], None],
    hello: Path | None = None,
) -> dict[str, Any]:
    """Measure starts.

    Args:
        weights: the checkpoint all systems load.
        warm: a warm state baked for it.
        rounds: fresh processes of each system with a hot page cache, the systems in turn.
        cold_pages: measure one more round with the page cache dropped before each start.
        systems: which of `SYSTEMS`.
        say: called with a line for each start.
        hello: where to keep the first sentence of the warm server, a WAV file.

    Returns:
        the report: machine, every run, medians of the hot ones, and ratios.
    """
    if unknown := set(systems) - set(SYSTEMS):
        raise BadInputError(f"there is no system {min(unknown)!r}", next_step=f"choose from {', '.join(SYSTEMS)}")
    manifests.read(warm)
    if "upstream" in systems:
        check_loadable(weights)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-bench-") as scratch, reference_clip() as clip:
        bench = _Bench(weights=weights, warm=warm, clip=clip, scratch=Path(scratch), hello=hello)
        for pages, count in (("hot", rounds), ("cold", int(cold_pages))):
            for number in range(1, count + 1):
                for system in systems:
                    bench.settle_pages(hot=pages == "hot")
                    say(f"{_TITLES[system]}, page cache {pages}, {number} of {count}")
                    result = {"system": system, "pages": pages, **bench.measure(system)}
                    result["apart"] = pages == "hot" and result.get("read_bytes", 0) > _HOT_LIMIT
                    runs.append(result)
    return summarize(runs, weights=weights, warm=warm)


def check_loadable(weights: Path) -> None:
    """Refuse a checkpoint that upstream has no code for.

    Raises:
        BadInputError: it is a shortened one.
    """
    synthetic = read_record(weights).synthetic
    if synthetic is not None and synthetic.t3_layers is not None:
        raise BadInputError(
            f"{weights} is a shortened checkpoint, which upstream cannot load to be compared with",
            next_step="make one of the full size: chatterbox-prewarm weights synthesize DIRECTORY",
        )


def summarize(runs: list[dict[str, Any]], *, weights: Path, warm: Path) -> dict[str, Any]:
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
    record = read_record(weights)
    return {
        "machine": machine(),
        "versions": versions(),
        "weights": {"repository": record.repository, "revision": record.revision},
        "set_digest": manifests.read(warm).set_digest,
        "tokens": REFERENCE_TOKENS,
        "runs": runs,
        "medians": medians,
        "ratios": {pages: _ratios(medians[pages]) for pages in medians if medians[pages]},
    }


def machine() -> dict[str, Any]:
    """The hardware that a report was made on."""
    fingerprint = read_fingerprint()
    return {
        "cpu": fingerprint.cpu_model,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": fingerprint.gpu,
        "driver": fingerprint.driver,
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """The software that a report was made with."""
    names = ("torch", "chatterbox-tts", "transformers", "numba", "librosa")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def settle(weights: Path, warm: Path | None) -> None:
    """Bring the files that starts read into the page cache."""
    packages = Path(sysconfig.get_paths()["purelib"])
    state = [path for path in warm.rglob("*") if path.is_file()] if warm is not None else []
    for path in (*packages.rglob("*.so*"), *state, *weights.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


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


class _Bench:
    """One fresh process after the other."""

    def __init__(self, *, weights: Path, warm: Path, clip: Path, scratch: Path, hello: Path | None) -> None:
        self._weights = weights
        self._warm = warm
        self._clip = clip
        self._scratch = scratch
        self._hello = hello
        self._count = 0

    def settle_pages(self, *, hot: bool) -> None:
        """Bring the files that starts read into the page cache, or drop the page cache."""
        if not hot:
            os.sync()
            try:
                Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
            except OSError as error:
                raise from_os_error(error, "dropping the page cache, which needs root") from error
            return
        settle(self._weights, self._warm)

    def measure(self, system: str) -> dict[str, Any]:
        """Start one system in a fresh process and return what was measured."""
        self._count += 1
        fresh = self._scratch / str(self._count)
        fresh.mkdir()
        match system:
            case "torch":
                return self._torch()
            case "upstream":
                return self._upstream(fresh)
            case _:
                return self._serve(fresh, warm=system == "warm")

    def _torch(self) -> dict[str, Any]:
        started = now()
        program = "import torch; print(open('/proc/self/io').read())"
        done = run_process([sys.executable, "-c", program])
        seconds = now() - started
        if done.returncode != 0:
            raise ModelError("torch cannot be imported", next_step="see its output above")
        return {"imported": seconds, "read_bytes": parse_read_bytes(done.stdout)}

    def _upstream(self, fresh: Path) -> dict[str, Any]:
        arguments = {
            "weights": str(self._weights),
            "clip": str(self._clip),
            "text": SHORT_TEXT,
            "max_new_tokens": REFERENCE_TOKENS,
        }
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(fresh), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        finished = run_process(
            [sys.executable, "-m", "chatterbox_prewarm.bench.upstream", json.dumps(arguments)], env=environment
        )
        log = parse_trial(finished.stdout, finished.returncode)
        marks = log["marks"]
        first = marks["first_audio"] - marks["attached"]
        steady = statistics.median(log["steady"])
        return {
            **marks,
            "first_request": first,
            "steady_request": steady,
            "first_to_steady": first / steady,
            "read_bytes": log["read_bytes"],
        }

    def _serve(self, fresh: Path, *, warm: bool) -> dict[str, Any]:
        voice = [] if warm else ["--voice", f"clip={self._clip}"]
        arguments = [
            *("--weights", str(self._weights), "--warm", str(self._warm), "--cache", str(fresh / "cache")),
            *("--policy", "require" if warm else "off"),
            *voice,
        ]
        # The inputs of the synthesis before ready: a sound of another length is a figure of its own, since a CPU's
        # kernels are chosen anew for each length.
        reference = manifests.read(self._warm).reference
        request = {
            "input": reference.text,
            "voice": reference.voice if warm else "clip",
            "seed": reference.seed,
            "max_new_tokens": reference.max_new_tokens,
        }
        with measured_server(arguments, log=fresh / "log") as server:
            status = server.wait_ready()
            sound, first = server.speak(request)
            first_audio = server.since_exec()
            steady = statistics.median(server.speak(request)[1] for _ in range(STEADY_REQUESTS))
            longer = {**request, "max_new_tokens": reference.max_new_tokens + 2}
            new_length = server.speak(longer)[1]
            if warm and self._hello is not None:
                self._hello.write_bytes(sound)
            phases = {phase["name"]: phase["start"] + phase["seconds"] for phase in status["phases"]}
            marks = status["marks"]
            to_ready = marks["ready"] - marks["attached"]
            return {
                "imported": phases["import"],
                "loaded": phases["weights"],
                **marks,
                "attached_to_ready": to_ready,
                "ready_to_steady": to_ready / steady,
                "first_audio": first_audio,
                "first_request": first,
                "steady_request": steady,
                "first_to_steady": first / steady,
                "new_length_request": new_length,
                "livez_first": server.livez_first,
                "livez_worst": server.livez_worst,
                "livez_failed": server.livez_failed,
                "hits": status["hits"],
                "misses": status["misses"],
                "phases": status["phases"],
                "read_bytes": server.read_bytes(),
            }
