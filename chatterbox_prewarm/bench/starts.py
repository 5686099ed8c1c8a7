"""One start after the other, each in a fresh process: a bare import of torch, upstream as it is, our server.

Upstream and a start of ours without a state begin with an empty Numba cache, as in a fresh container, and prepare their
voice from a clip. Each result carries the bytes that the process still read from storage.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from chatterbox_prewarm.bake.save import REFERENCE_TOKENS
from chatterbox_prewarm.bench.server import measured_server
from chatterbox_prewarm.bench.upstream import STEADY_REQUESTS, parse_read_bytes
from chatterbox_prewarm.errors import ModelError, from_os_error
from chatterbox_prewarm.model.warmup.inputs import SHORT_TEXT
from chatterbox_prewarm.state.manifest import read_manifest
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.system.json_subprocess import parse_report
from chatterbox_prewarm.system.metrics import now
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.weights.record import read_record


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


def checkpoint(weights: Path) -> dict[str, Any]:
    """Which checkpoint a report was made with."""
    record = read_record(weights)
    size = None if record.synthetic is None else record.synthetic.size
    return {"repository": record.repository, "revision": record.revision, "synthetic": size}


def drop_page_cache() -> None:
    """Have the next start read everything from storage.

    Raises:
        BadInputError: this user may not.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    except OSError as error:
        raise from_os_error(error, "dropping the page cache, which needs root") from error


class Starts:
    """Starts of one checkpoint on one device.

    Args:
        weights: the checkpoint.
        clip: that a voice is made of where none is baked.
        scratch: a folder for what the processes write.
        device: of all systems.
    """

    def __init__(self, *, weights: Path, clip: Path, scratch: Path, device: str = "cpu") -> None:
        self._weights = weights
        self._clip = clip
        self._scratch = scratch
        self._device = device
        self._count = 0

    def torch(self) -> dict[str, Any]:
        """Import torch and end."""
        started = now()
        program = "import torch; print(open('/proc/self/io').read())"
        done = run_process([sys.executable, "-c", program])
        seconds = now() - started
        if done.returncode != 0:
            raise ModelError("torch cannot be imported", next_step="see its output above")
        return {"imported": seconds, "read_bytes": parse_read_bytes(done.stdout)}

    def upstream(self) -> dict[str, Any]:
        """Upstream as it is, up to its first audio and a few requests more."""
        fresh = self._fresh()
        arguments = {
            "weights": str(self._weights),
            "clip": str(self._clip),
            "text": SHORT_TEXT,
            "max_new_tokens": REFERENCE_TOKENS,
            "device": self._device,
        }
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(fresh), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        finished = run_process(
            [sys.executable, "-m", "chatterbox_prewarm.bench.upstream", json.dumps(arguments)], env=environment
        )
        log = parse_report(finished.stdout, finished.returncode)
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

    def ours(
        self,
        state: Path,
        *,
        policy: str,
        cache: Path | None = None,
        profile: str | None = None,
        hello: Path | None = None,
    ) -> dict[str, Any]:
        """Our server, up to its first audio and a few requests more.

        Args:
            state: a warm state; under the policy "off" only its reference synthesis is repeated.
            policy: of the start.
            cache: the cache directory that the state is bound to; a new one by default.
            profile: another than the state's.
            hello: where to keep the first sentence, a WAV file.
        """
        fresh, warm = self._fresh(), policy != "off"
        arguments = [
            *("--weights", str(self._weights), "--warm", str(state), "--cache", str(cache or fresh / "cache")),
            *("--policy", policy, "--device", self._device),
            *(() if warm else ("--voice", f"clip={self._clip}")),
            *(("--profile", profile) if profile else ()),
        ]
        # The inputs of the synthesis before ready: a sound of another length is a figure of its own, since a CPU's
        # kernels are chosen anew for each length.
        reference = read_manifest(state).reference
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
            if hello is not None:
                hello.write_bytes(sound)
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

    def _fresh(self) -> Path:
        self._count += 1
        fresh = self._scratch / str(self._count)
        fresh.mkdir()
        return fresh
