"""Measure starts in fresh processes: `import torch`, upstream without changes, and our server.

Upstream and our server without a warm state start with an empty Numba cache, as in a fresh container. Both prepare
their voice from a clip. Each result contains the number of bytes that the process read from storage.
"""

from __future__ import annotations

import mmap
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.clients import request_speech
from chatterbox_prewarm.bench.server import measured_server
from chatterbox_prewarm.bench.upstream import STEADY_REQUESTS
from chatterbox_prewarm.errors import ModelError, from_os_error
from chatterbox_prewarm.model.warmup.settings import SHORT_TEXT
from chatterbox_prewarm.start.save import REFERENCE_TOKENS
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.system.json_subprocess import run_module
from chatterbox_prewarm.system.metrics import now
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.mapped import MADV_POPULATE_READ
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.bench.server import MeasuredServer

#: Prefix of the names of temporary folders.
SCRATCH = "chatterbox-prewarm-bench-"


def machine() -> dict[str, Any]:
    """Describe the hardware."""
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
    """Return the versions of the software that affects a measurement."""
    names = ("torch", "chatterbox-tts", "transformers", "numba", "librosa")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def settle(weights: Path, warm: Path | None) -> None:
    """Read the files that a start needs into the page cache. Files that are already there take no time."""
    packages = Path(sysconfig.get_paths()["purelib"])
    state = [path for path in warm.rglob("*") if path.is_file()] if warm is not None else []
    for path in (*packages.rglob("*.so*"), *state, *weights.glob("*.safetensors")):
        if path.stat().st_size == 0:
            continue
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as pages:
            try:
                pages.madvise(MADV_POPULATE_READ)
            except OSError:  # an older kernel
                while pages.read(1 << 24):
                    pass


def checkpoint(weights: Path) -> dict[str, Any]:
    """Identify a checkpoint."""
    record = read_record(weights)
    size = None if record.synthetic is None else record.synthetic.size
    return {"repository": record.repository, "revision": record.revision, "synthetic": size}


def setup(weights: Path, warm: Path, device: str) -> dict[str, Any]:
    """Describe a measurement: machine, versions, checkpoint, warm state and device."""
    return {
        "machine": machine(),
        "versions": versions(),
        "device": device,
        "weights": checkpoint(weights),
        "set_digest": State.read(warm).manifest.set_digest,
    }


def drop_page_cache() -> None:
    """Drop the page cache, so that the next start reads everything from storage.

    Raises:
        BadInputError: this user is not permitted to do it.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError as error:
        raise from_os_error(error, "dropping the page cache, which needs root") from error


def time_torch_import() -> dict[str, Any]:
    """Time `import torch` until it is done. The end of the process takes 0.4 s more, which no server waits for."""
    started = now()
    program = (
        "import torch, time; print(time.clock_gettime(time.CLOCK_BOOTTIME),"
        " *(line.split()[1] for line in open('/proc/self/io') if line.startswith('read_bytes')))"
    )
    finished = run_process([sys.executable, "-c", program])
    if finished.returncode != 0:
        raise ModelError("torch cannot be imported", next_step="see its output above")
    done, read = finished.stdout.split()
    return {"imported": float(done) - started, "read_bytes": int(read)}


def time_upstream(weights: Path, clip: Path, device: str, *, requests: int = STEADY_REQUESTS) -> dict[str, Any]:
    """Time upstream without changes, up to its first audio and `requests` more requests."""
    arguments = {
        "weights": str(weights),
        "clip": str(clip),
        "text": SHORT_TEXT,
        "max_new_tokens": REFERENCE_TOKENS,
        "device": device,
        "requests": requests,
    }
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as numba_cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": numba_cache, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        log = run_module("chatterbox_prewarm.bench.upstream", arguments, env=environment)
    marks = log["marks"]
    first = marks["first_audio"] - marks["attached"]
    result = {**marks, "first_request": first, "read_bytes": log["read_bytes"]}
    if log["steady"]:
        steady = statistics.median(log["steady"])
        result |= {"steady_request": steady, "first_to_steady": first / steady}
    return result


def time_server(  # noqa: PLR0913 - keyword options of a benchmark
    weights: Path,
    state: Path,
    device: str,
    *,
    clip: Path | None = None,
    serve_options: Sequence[str] = (),
    hello: Path | None = None,
    requests: int = STEADY_REQUESTS,
) -> dict[str, Any]:
    """Time our server, up to its first audio and some more requests.

    Args:
        weights: checkpoint.
        state: warm state.
        device: torch device.
        clip: for a cold start, the reference clip of the voice. Then only the inputs of the state's reference synthesis
            are used. Without a clip, the start is warm.
        serve_options: additional options of `serve`. By default, the cache is a new directory.
        hello: file to which the first sentence is written as WAV.
        requests: requests after the first one. With one, no other length and no stream is requested. With none, there
            is no ratio to a steady request.
    """
    request = _reference_request(state, cold=clip is not None)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        arguments = [
            *("--weights", str(weights), "--warm", str(state), "--cache", f"{scratch}/cache", "--device", device),
            *(("--policy", "require") if clip is None else ("--policy", "off", "--voice", f"clip={clip}")),
            *serve_options,
        ]
        with measured_server(arguments, log=Path(scratch) / "log") as server:
            status = server.wait_ready()
            audio, first = server.speak(request)
            first_audio = server.since_exec()
            steady = [server.speak(request)[1] for _ in range(requests)]
            more = {"new_length_request": _new_length(server, request)} if requests > 1 else {}
            read_bytes, resident_bytes = server.read_bytes(), server.resident_bytes()
            if requests > 1 and clip is None:  # a cold start takes long enough without streams
                more["first_chunk_to_steady"] = _first_chunk(server, request, requests)
    if hello is not None:
        hello.write_bytes(audio)
    phases = {phase["name"]: phase["start"] + phase["seconds"] for phase in status["phases"]}
    marks = status["marks"]
    to_ready = marks["ready"] - marks["attached"]
    if steady:
        usual = statistics.median(steady)
        more |= {
            "steady_request": usual,
            "ready_to_steady": to_ready / usual,
            "first_to_steady": first / usual,
            "first_to_sum": first_audio / (marks["attached"] + usual),
        }
    return {
        "imported": phases["import"],
        "loaded": phases["weights"],
        **marks,
        "attached_to_ready": to_ready,
        "first_audio": first_audio,
        "first_request": first,
        **more,
        "modules": float(status["modules"]),
        "resident_bytes": float(resident_bytes),
        **{f"livez_{name}": getattr(server, f"livez_{name}") for name in ("first", "worst", "failed")},
        **{name: status[name] for name in ("hits", "misses", "phases")},
        "read_bytes": read_bytes,
    }


def _new_length(server: MeasuredServer, request: dict[str, Any]) -> float:
    """Return the seconds of a request for another length of audio."""
    return server.speak({**request, "max_new_tokens": request["max_new_tokens"] + 2})[1]


def _first_chunk(server: MeasuredServer, request: dict[str, Any], streams: int) -> float:
    """Return the ratio of the times to the first chunk: first stream to later streams."""
    chunks = [request_speech(server.target, request, streamed=True).first_chunk for _ in range(streams)]
    return chunks[0] / statistics.median(chunks[1:])


def _reference_request(state: Path, *, cold: bool) -> dict[str, Any]:
    """Return the request that repeats the synthesis that the server did before it was ready.

    Another length is measured separately, because a CPU chooses kernels for each length of audio.
    """
    reference = State.read(state).manifest.reference
    return {
        "input": reference.text,
        "voice": "clip" if cold else reference.voice,
        "seed": reference.seed,
        "max_new_tokens": reference.max_new_tokens,
    }
