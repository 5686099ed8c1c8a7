"""bench append: one more layer for a large image in a registry, against a real registry on the loopback interface."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from chatterbox_prewarm.bench.starts import machine
from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.append import append
from chatterbox_prewarm.image.compose import platform_of
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image, to_documents
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.registry.client import Repository
from chatterbox_prewarm.image.state_layers import gather
from chatterbox_prewarm.system.json_subprocess import parse_report, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PROGRAM = "docker-registry"
#: Bytes of a layer of the base; an image with torch has one of 6 GB and some smaller ones.
_LAYER = 1_000_000_000
_BLOCK = 1 << 20


class _Noise(io.RawIOBase):
    """A layer's worth of bytes that do not compress, without holding them: one block, numbered."""

    def __init__(self, number: int, size: int) -> None:
        self._block = hashlib.sha512(str(number).encode()).digest() * (_BLOCK // 64)
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._left, _BLOCK)
        buffer[:count] = self._block[:count]
        self._left -= count
        return count


def run(warm: Path, *, gigabytes: int, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Make a base of that size in a registry, then append a state to it in fresh processes.

    Args:
        warm: a state.
        gigabytes: of the base.
        rounds: how often: into the base's repository first, then into others of the registry.
        say: called with one line for each step.

    Returns:
        the machine, the base's bytes, and for each round seconds, blobs and bytes sent, and the peak memory of the
        process.

    Raises:
        EngineError: there is no registry program.
    """
    with (
        tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-bench-") as scratch,
        registry(Path(scratch)) as address,
    ):
        say(f"a base of {gigabytes} GB")
        base = f"{address}/speech:cold"
        size = _make_base(base, warm, gigabytes)
        runs = []
        for number in range(1, rounds + 1):
            say(f"append, {number} of {rounds}")
            # In a repository of its own it is sent anew, and the base's layers are taken over from their repository.
            target = f"{address}/speech:warm" if number == 1 else f"{address}/speech-{number}:warm"
            arguments = {"base": base, "target": target, "warm": str(warm)}
            finished = subprocess.run(
                [sys.executable, "-m", "benchmarks.append", json.dumps(arguments)],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            runs.append(parse_report(finished.stdout, finished.returncode))
    return {"machine": machine(), "base_bytes": size, "runs": runs}


def measure(*, base: str, target: str, warm: str) -> dict[str, Any]:
    """Append in this process."""
    started = time.monotonic()
    with gather([Path(warm)]) as addition:
        made = append(parse(base), parse(target), addition)
    seconds = time.monotonic() - started
    return {
        "seconds": round(seconds, 3),
        "blobs_sent": made.blobs_sent,
        "bytes_sent": made.bytes_sent,
        "layer_bytes": sum(layer.size for layer in addition.layers),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


@contextlib.contextmanager
def registry(scratch: Path) -> Iterator[str]:
    """A real registry that keeps its blobs in a folder; its address.

    Raises:
        EngineError: there is no registry program.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise EngineError(f"there is no {_PROGRAM}", next_step="apt-get install docker-registry")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    settings = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(scratch / "storage")}},
        "http": {"addr": address, "secret": os.urandom(8).hex()},
    }
    (scratch / "registry.json").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    command = [program, "serve", str(scratch / "registry.json")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(tuple(address.split(":"))):  # type: ignore[arg-type]
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def _make_base(reference: str, warm: Path, gigabytes: int) -> int:
    """Store an image of this project's kind in a registry; its bytes."""
    from chatterbox_prewarm.image.labels import PREFIX
    from chatterbox_prewarm.state.manifest import read_manifest

    manifest = read_manifest(warm)
    layers = []
    with Repository(parse(reference)) as repository:
        for number in range(gigabytes):

            def opened(number: int = number) -> contextlib.closing[BinaryIO]:
                return contextlib.closing(cast("BinaryIO", io.BufferedReader(_Noise(number, _LAYER), _BLOCK)))

            sha256 = hashlib.sha256()
            with opened() as stream:
                while chunk := stream.read(_BLOCK):
                    sha256.update(chunk)
            layers.append(Descriptor(media_type=OCI_LAYER, digest=f"sha256:{sha256.hexdigest()}", size=_LAYER))
            repository.put_blob(layers[-1], opened)
        system, _, architecture = platform_of(manifest.fingerprint["arch"]).partition("/")
        image = Image(
            config={
                "os": system,
                "architecture": architecture,
                "config": {
                    "Labels": {
                        f"{PREFIX}torch": manifest.fingerprint["torch"],
                        f"{PREFIX}variant": manifest.variant,
                    }
                },
                "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
            },
            layers=tuple(layers),
        )
        document, descriptor, config = to_documents(image)
        repository.put_blob(descriptor, lambda: contextlib.nullcontext(io.BytesIO(config)))
        repository.put_manifest(document, parse(reference).tag)
    return sum(layer.size for layer in layers)


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"a base of {found['base_bytes'] / 1e9:.0f} GB"]
    lines += [
        f"  {run['seconds']:.2f} s, {run['blobs_sent']} blobs sent, {run['bytes_sent'] / 1e6:.1f} MB, "
        f"{run['peak_megabytes']:.0f} MB of memory"
        for run in found["runs"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    report(measure)
