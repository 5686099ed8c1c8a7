"""`benchmarks append`: append a warm state to a large image in a real registry on this machine."""

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
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.bench.starts import SCRATCH, machine
from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.append import append
from chatterbox_prewarm.image.compose import platform_of
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image, to_documents
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.registry.client import Repository
from chatterbox_prewarm.image.state_layers import pack_states
from chatterbox_prewarm.system.json_subprocess import report, run_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PROGRAM = "docker-registry"
#: Bytes of each layer of the base image. An image with torch has one layer of 6 GB and some smaller ones.
_LAYER = 1_000_000_000
_BLOCK = 1 << 20


class _Noise(io.RawIOBase):
    """Stream of `size` incompressible bytes that needs memory for one block only; `number` makes it different."""

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
    """Upload a base image to a local registry, then append a state to it in fresh processes.

    Args:
        warm: warm state to append.
        gigabytes: size of the base image.
        rounds: number of appends. The first goes into the repository of the base, each other one into a new repository.
        say: called with one line for each step.

    Returns:
        the machine, the bytes of the base, and for each round the result of `measure`.

    Raises:
        EngineError: the registry program is not installed.
    """
    with (
        tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch,
        registry(Path(scratch)) as address,
    ):
        say(f"upload a base image of {gigabytes} GB")
        base = f"{address}/speech:cold"
        size = _make_base(base, warm, gigabytes)
        runs = []
        for number in range(1, rounds + 1):
            say(f"append, {number} of {rounds}")
            # A new repository needs the warm layer again, but reuses the layers of the base from the first repository.
            target = f"{address}/speech:warm" if number == 1 else f"{address}/speech-{number}:warm"
            arguments = {"base": base, "target": target, "warm": str(warm)}
            runs.append(run_module("benchmarks.append", arguments))
    return {"machine": machine(), "base_bytes": size, "runs": runs}


def measure(*, base: str, target: str, warm: str) -> dict[str, Any]:
    """Append in this process.

    Returns:
        seconds, blobs and bytes sent, bytes of the warm layer, and peak memory of the process.
    """
    started = time.monotonic()
    with pack_states([Path(warm)]) as addition:
        appended = append(parse(base), parse(target), addition)
    seconds = time.monotonic() - started
    return {
        "seconds": round(seconds, 3),
        "blobs_sent": appended.blobs_sent,
        "bytes_sent": appended.bytes_sent,
        "layer_bytes": sum(layer.size for layer in addition.layers),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
    }


@contextlib.contextmanager
def registry(scratch: Path) -> Iterator[str]:
    """Run a real registry that stores its blobs in a folder; yield its address.

    Raises:
        EngineError: the registry program is not installed.
    """
    program = shutil.which(_PROGRAM)
    if program is None:
        raise EngineError(f"the program {_PROGRAM} is not installed", next_step="apt-get install docker-registry")
    port = free_port()
    address = f"127.0.0.1:{port}"
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
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def _make_base(reference: str, warm: Path, gigabytes: int) -> int:
    """Upload a base image with the labels that `append` checks; return its bytes."""
    from chatterbox_prewarm.image.labels import PREFIX
    from chatterbox_prewarm.state.state import State

    manifest = State.read(warm).manifest
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


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    lines = [f"base image: {report['base_bytes'] / 1e9:.0f} GB"]
    lines += [
        f"  {run['seconds']:.2f} s, {run['blobs_sent']} blobs sent, {run['bytes_sent'] / 1e6:.1f} MB, "
        f"{run['peak_megabytes']:.0f} MB of memory"
        for run in report["runs"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    report(measure)
