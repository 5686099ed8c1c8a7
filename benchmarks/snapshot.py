"""`benchmarks snapshot`: freeze a process that is ready to speak with CRIU, and compare its restore with a warm start.

A restore needs the privileges, the kernel and the processor features of the freeze, and a version of CRIU that knows
the kernel. A process on a GPU cannot be frozen in this way.
"""

from __future__ import annotations

import json
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
    report: dict[str, Any] = {"machine": machine(), "criu": version.stdout.split()[1], "start": [], "restore": []}
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            folder, images = Path(scratch), Path(scratch) / "images"
            images.mkdir()
            settle(weights, warm)
            say(f"warm start and freeze, {number} of {rounds}")
            started = now()
            process = _start(weights, warm, folder)
            try:
                ready = _wait(folder / _READY, process) - started
                report["freeze"] = _memory(process.pid) | _freeze(criu, images, process.pid)
                report["start"].append(_speak(folder, process, started) | {"ready": round(ready, 3)})
            finally:
                process.kill()
                process.wait()
            for name in (_SPEAK, _SPOKEN):
                (folder / name).unlink()
            say(f"restore, {number} of {rounds}")
            started = now()
            # In a new PID namespace the process gets its old number, even if that is taken here.
            restoring = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            with subprocess.Popen([*restoring, *_command(criu, "restore", images)]) as restored:
                try:
                    report["restore"].append(_speak(folder, restored, started))
                finally:
                    restored.kill()
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


def _speak(folder: Path, process: subprocess.Popen[bytes], started: float) -> dict[str, float]:
    """Let the process speak; return the seconds from the start to its audio, and those of the synthesis."""
    (folder / _SPEAK).touch()
    ended = _wait(folder / _SPOKEN, process)
    return {"first_audio": round(ended - started, 3), **json.loads((folder / _SPOKEN).read_text(encoding="ascii"))}


def _wait(path: Path, process: subprocess.Popen[bytes] | None = None) -> float:
    """Wait for a file of a process; return the time in seconds since boot.

    Raises:
        ModelError: the process ended without it, or it does not appear.
    """
    deadline = now() + _SECONDS
    while now() < deadline:
        if path.exists():
            return now()
        if process is not None and process.poll() is not None:
            logs = [log.read_text(errors="replace")[-500:] for log in path.parent.rglob("restore.log")]
            raise ModelError(f"the process ended with {process.returncode}: {logs}", next_step="start it by hand")
        time.sleep(0.002)
    raise ModelError(f"there is no {path.name} after {_SECONDS:.0f} s", next_step="start the process by hand")


def _memory(pid: int) -> dict[str, int]:
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines())
    return {name: 1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")}


def _command(criu: str, action: str, images: Path, *options: str) -> list[str]:
    log = f"--log-file={action}.log"
    return [criu, action, f"--images-dir={images}", "--file-locks", "--shell-job", log, "-v2", *options]


def _freeze(criu: str, images: Path, pid: int) -> dict[str, float]:
    """Freeze a process and let it continue; return the seconds and bytes.

    Raises:
        EngineError: CRIU failed.
    """
    began = time.monotonic()
    if run_process(_command(criu, "dump", images, f"--tree={pid}", "--leave-running")).returncode != 0:
        log = (images / "dump.log").read_text(errors="replace")
        raise EngineError(f"criu dump failed: {log[-500:]}", next_step="see its log above")
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 2), "bytes": sum(path.stat().st_size for path in images.iterdir())}


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
