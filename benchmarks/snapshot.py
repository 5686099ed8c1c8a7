"""`benchmarks snapshot`: freeze a process that is ready to speak with CRIU, and compare its restore with a warm start.

A restore needs the privileges, the kernel and the processor features of the freeze, and a version of CRIU that knows
the kernel. A process on a GPU cannot be frozen in this way.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.starts import SCRATCH, machine, settle
from chatterbox_prewarm.errors import EngineError, ModelError
from chatterbox_prewarm.system.metrics import now
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS = 300.0
#: The names of the files by which this process and the frozen one communicate. No file may be open during a freeze.
_READY, _SPEAK, _SPOKEN = "ready", "speak", "spoken"


def run(weights: Path, warm: Path, *, criu: str, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure warm starts and restores on the CPU.

    Args:
        weights: checkpoint.
        warm: warm state.
        criu: the program.
        rounds: starts and restores.
        say: called with one line for each step.

    Returns:
        the machine, the bytes and seconds of the freeze, the memory of the process, and for each start and each restore
        the seconds until ready and until the first audio.

    Raises:
        EngineError: CRIU is missing or failed.
        ModelError: the process failed.
    """
    version = run_process([criu, "--version"])
    if shutil.which(criu) is None or version.returncode != 0:
        raise EngineError(f"{criu} does not run", next_step="install CRIU, and name it with --criu")
    report: dict[str, Any] = {"machine": machine(), "criu": version.stdout.split()[1], "start": [], "restore": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            folder, images = Path(scratch), Path(scratch) / "images"
            images.mkdir()
            settle(weights, warm)
            say(f"warm start, {number + 1} of {rounds}")
            started = now()
            process = _start(weights, warm, folder)
            ready = _wait(folder / _READY) - started
            memory = _memory(process.pid)
            say("freeze")
            frozen = time.monotonic()
            _criu(criu, "dump", images, f"--tree={process.pid}", "--leave-running")
            report["freeze"] = {
                "seconds": round(time.monotonic() - frozen, 2),
                "bytes": sum(path.stat().st_size for path in images.iterdir()),
                **memory,
            }
            report["start"].append(_speak(folder, started) | {"ready": round(ready, 3)})
            process.wait()
            for name in (_SPEAK, _SPOKEN):
                (folder / name).unlink()
            say(f"restore, {number + 1} of {rounds}")
            started = now()
            # In a new PID namespace the process gets its old number, even if that is taken here.
            restoring = ["unshare", "--pid", "--fork", "--mount-proc"]
            with subprocess.Popen([*restoring, *_command(criu, "restore", images)]) as restored:
                report["restore"].append(_speak(folder, started))
                restored.wait()
    for kind in ("start", "restore"):
        report[f"first audio, {kind}"] = round(statistics.median(one["first_audio"] for one in report[kind]), 3)
    return report


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    freeze = report["freeze"]
    return (
        f"first audio after a warm start {report['first audio, start']:.2f} s, "
        f"after a restore {report['first audio, restore']:.2f} s\n"
        f"freeze {freeze['seconds']:.1f} s, {freeze['bytes'] / 1e6:.0f} MB"
    )


def _start(weights: Path, warm: Path, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.snapshot", str(weights), str(warm), str(folder)]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)


def _speak(folder: Path, started: float) -> dict[str, float]:
    """Let the process speak; return the seconds from the start to its audio, and those of the synthesis."""
    (folder / _SPEAK).touch()
    ended = _wait(folder / _SPOKEN)
    return {"first_audio": round(ended - started, 3), **json.loads((folder / _SPOKEN).read_text(encoding="ascii"))}


def _wait(path: Path) -> float:
    """Wait for a file; return the time in seconds since boot.

    Raises:
        ModelError: it does not appear.
    """
    deadline = now() + _SECONDS
    while now() < deadline:
        if path.exists():
            return now()
        time.sleep(0.002)
    raise ModelError(f"the process did not write {path.name} in {_SECONDS:.0f} s", next_step="start it by hand")


def _memory(pid: int) -> dict[str, int]:
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")}


def _command(criu: str, action: str, images: Path, *options: str) -> list[str]:
    log = f"--log-file={action}.log"
    return [criu, action, f"--images-dir={images}", "--file-locks", "--shell-job", log, "-v2", *options]


def _criu(criu: str, action: str, images: Path, *options: str) -> None:
    if run_process(_command(criu, action, images, *options)).returncode != 0:
        log = (images / f"{action}.log").read_text(errors="replace")
        raise EngineError(f"criu {action} failed: {log[-500:]}", next_step="see its log above")


def _process(weights: Path, warm: Path, folder: Path) -> None:
    """Load the model, wait for the file `speak`, synthesize, and write `spoken`."""
    from chatterbox_prewarm.start.attach import load_warmup_cache

    attached = load_warmup_cache(warm, weights, cache=folder / "cache", policy="require")
    attached.synthesizer.check()
    (folder / _READY).touch()
    _wait(folder / _SPEAK)  # it ends by itself, because a restored process has another parent
    began = time.monotonic()
    attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
    temporary = folder / "temporary"
    temporary.write_text(json.dumps({"synthesis": round(time.monotonic() - began, 3)}), encoding="ascii")
    temporary.rename(folder / _SPOKEN)


if __name__ == "__main__":
    _process(*map(Path, sys.argv[1:4]))
