"""Run parts of tests in separate processes, because they change the process or must see its imports.

`call` runs one of `PROGRAMS` and returns its report. If the program reports an error, `call` raises it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.system.json_subprocess import parse_report, report

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TIMEOUT = 60.0
HEAVY = ("torch", "numba", "transformers", "librosa", "numpy", "model_signing", "sigstore", "cryptography")


def start(program: str, arguments: Mapping[str, Any], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a program of this file with a pipe as its standard output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        **(env or {}),
    }
    command = [sys.executable, str(Path(__file__)), json.dumps({"program": program, **arguments})]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def call(program: str, *, env: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """Run a program of this file, and return its report or raise the error that it reported."""
    with start(program, arguments, env) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return parse_report(output, process.returncode)


def fingerprint() -> dict[str, Any]:
    from chatterbox_prewarm.system.fingerprint import read_fingerprint

    return {"fields": read_fingerprint().fields(), "heavy": [name for name in HEAVY if name in sys.modules]}


def read_facts() -> dict[str, Any]:
    from chatterbox_prewarm.state.node_facts import node_facts

    return {"facts": node_facts(), "heavy": [name for name in HEAVY if name in sys.modules]}


def prepare(
    *,
    warm: str,
    weights: str,
    cache: str,
    policy: str,
    imports: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
    key: str | None = None,
    signature: str | None = None,
    expected_digest: str | None = None,
) -> dict[str, Any]:
    from chatterbox_prewarm.start.options import StartOptions
    from chatterbox_prewarm.start.prepare import prepare as prepare_state
    from chatterbox_prewarm.state.signature import Trust

    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{warm}/"):
            opened.append(str(arguments[0]).removeprefix(f"{warm}/"))

    sys.addaudithook(watch)
    trust = Trust(
        key=Path(key) if key else None,
        signature=Path(signature) if signature else None,
        expected_digest=expected_digest,
    )
    options = StartOptions(warm=Path(warm), weights=Path(weights), cache=Path(cache), policy=policy, trust=trust)
    for name in first:
        __import__(name)
    prepared = prepare_state(options)
    for name in imports:
        __import__(name)
    return {
        "usable": list(prepared.usable),
        "has_manifest": prepared.state is not None,
        "metrics": prepared.metrics.to_dict(),
        "environment": {
            name: os.environ.get(name) for name in ("NUMBA_CACHE_DIR", "NUMBA_CPU_NAME", "HF_HUB_OFFLINE", "HF_HOME")
        },
        "heavy": [name for name in HEAVY if name in sys.modules],
        "opened": opened,
    }


def sign(*, warm: str, key: str) -> dict[str, Any]:
    from chatterbox_prewarm.proof import probes
    from chatterbox_prewarm.state.signing import sign as sign_state
    from chatterbox_prewarm.state.state import State

    seen = probes.install(Path(warm))
    signature = sign_state(State.open(Path(warm)), Path(key))
    return {"signature": str(signature), "network": seen.network, "programs": seen.programs, "writes": seen.writes}


def import_from_pack(*, pack: str, imports: list[str]) -> dict[str, Any]:
    from chatterbox_prewarm.families import bytecode
    from chatterbox_prewarm.system.metrics import StartMetrics

    metrics, imported = StartMetrics(), set[str]()
    for name in imports:
        sys.modules.pop(name, None)
    bytecode.is_packed("", "")  # first, because it imports modules that are not counted
    __import__("heapq")  # `sched` imports it, but only the modules of the test are counted
    bytecode.install(bytecode.read_pack(Path(pack)) if pack else None, metrics, imported)
    modules = [__import__(name) for name in imports]
    return {
        "metrics": metrics.to_dict(),
        "imported": sorted(imported),
        "public": {module.__name__: sorted(name for name in vars(module) if name[0] != "_") for module in modules},
    }


def probed(*, warm: str, action: str) -> dict[str, Any]:
    """Do one action, most of which a warm process must not do, and return the report of the probes."""
    from chatterbox_prewarm.proof import probes

    baked = Path(warm)
    descriptor = socket.socket()
    actions: dict[str, Callable[[], object]] = {
        "nothing": (baked / "kept").read_bytes,
        "write elsewhere": lambda: (baked.parent / "elsewhere").write_text("x"),
        "write": lambda: (baked / "new").write_text("x"),
        "append": lambda: (baked / "kept").open("ab").close(),
        "make a folder": (baked / "folder").mkdir,
        "remove": (baked / "kept").unlink,
        "rename into": lambda: (baked.parent / "outside").rename(baked / "inside"),
        "truncate": lambda: os.truncate(baked / "kept", 0),
        "chmod": lambda: (baked / "kept").chmod(0o600),
        "chmod the root": lambda: baked.chmod(0o700),
        "getaddrinfo": lambda: socket.getaddrinfo("127.0.0.1", 9),
        "gethostbyname": lambda: socket.gethostbyname("127.0.0.1"),
        "connect": lambda: descriptor.connect_ex(("127.0.0.1", 9)),
        "Popen": lambda: subprocess.run(["gcc", "--version"], stdout=subprocess.DEVNULL),
        "Popen with bytes": lambda: subprocess.run([b"/nonexistent/gcc"]),
        "Popen of a shell": lambda: subprocess.run("cd / && (/nonexistent/gcc x.c)", shell=True, stderr=-3),
        "os.system": lambda: os.system("/nonexistent/gcc -c main.c 2> /dev/null"),
    }
    seen = probes.install(baked)
    with descriptor, contextlib.suppress(OSError):
        actions[action]()
    return {"network": seen.network, "programs": seen.programs, "writes": seen.writes}


def fetch(
    *,
    directory: str,
    repository: str,
    files: list[str],
    tensors: list[str],
    revision: str,
    published: dict[str, str] | None = None,
    archives: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    from chatterbox_prewarm.weights.fetch import fetch as fetch_weights
    from chatterbox_prewarm.weights.variants import ENGLISH, Archive, Variant

    # A variant with few files.
    small = type("SmallVariant", (Variant,), {"files": tuple(files), "safetensors": tuple(tensors)})
    table = {field.name: getattr(ENGLISH, field.name) for field in dataclasses.fields(ENGLISH)}
    given = {
        "repository": repository,
        "revision": revision,
        "published": published or {},
        "archives": tuple(Archive(**{**archive, "members": tuple(archive["members"])}) for archive in archives),
    }
    variant = small(**{**table, **given})
    found = fetch_weights(Path(directory), variant=variant)
    return {"revision": found.revision, "files": {entry.path: entry.sha256 for entry in found.files}}


def fill_numba_cache(*, warm: str, cache: str, times: int) -> dict[str, Any]:
    """Empty and fill the Numba cache several times, as repeated starts do."""
    from chatterbox_prewarm.families.numba_cache import NumbaFamily
    from chatterbox_prewarm.system.metrics import StartMetrics

    for _ in range(times):
        NumbaFamily().prepare(None, Path(cache), StartMetrics())
        NumbaFamily().prepare(Path(warm) / "numba", Path(cache), StartMetrics())
    return {"filled": times}


def hold_lock(*, path: str) -> dict[str, Any]:
    """Act as a running bake: hold the lock of a path and a sealed staging folder until killed."""
    from chatterbox_prewarm.system.atomic_files import seal, staging_folder
    from chatterbox_prewarm.system.locks import exclusive_lock

    with exclusive_lock(Path(path)), staging_folder(Path(path)) as staging:
        (staging / "family").mkdir()
        (staging / "family" / "file").write_text("incomplete")
        seal(staging)
        Path(path).with_name("locked").touch()
        time.sleep(TIMEOUT)
    return {}


def hold_scratch_folder(*, path: str) -> dict[str, Any]:
    """Act as a running append: hold a folder for temporary files next to a path until killed."""
    import tempfile

    from chatterbox_prewarm.system.atomic_files import scratch_folder

    tempfile.tempdir = str(Path(path).parent)
    with scratch_folder("layers-") as folder:
        (folder / "0.tar.gz").write_text("incomplete")
        Path(path).with_name("locked").touch()
        time.sleep(TIMEOUT)
    return {}


def hold_temporary_file(*, path: str) -> dict[str, Any]:
    """Act as a running upload: write a temporary file of a path until killed."""
    from chatterbox_prewarm.system.atomic_files import atomic_file

    with atomic_file(Path(path), leftovers="blob-1") as temporary:
        temporary.write_text("incomplete")
        Path(path).with_name("locked").touch()
        time.sleep(TIMEOUT)
    return {}


def share_lock(*, path: str) -> dict[str, Any]:
    """Act as a server that started from a cache: share the lock of a path until killed."""
    from chatterbox_prewarm.system import locks

    locks.share_lock(Path(path))
    locks.share_lock(Path(path))  # a second call changes nothing
    Path(path).with_name("locked").touch()
    time.sleep(TIMEOUT)
    return {}


PROGRAMS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        fingerprint,
        read_facts,
        prepare,
        sign,
        import_from_pack,
        probed,
        fetch,
        fill_numba_cache,
        hold_lock,
        hold_scratch_folder,
        hold_temporary_file,
        share_lock,
    )
}


def main(program: str, **arguments: Any) -> dict[str, Any]:
    return PROGRAMS[program](**arguments)


if __name__ == "__main__":
    report(main)
