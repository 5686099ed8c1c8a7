"""`benchmarks routes`: add one warm state to an image by every route that needs no GPU, and prove each image.

The classic builder bakes the state, and the other routes use it. BuildKit installs the packages once, in the stages
`deps-lean` and `deps-full`; podman gets a copy of the full image. Both builders load their image into Docker as an
archive, so that way is included.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.append import registry
from benchmarks.image import build, copy_context, docker
from chatterbox_prewarm.bench.starts import SCRATCH, machine
from chatterbox_prewarm.errors import BadInputError, EngineError, error_with_code
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.engines.connect import connect
from chatterbox_prewarm.image.oci import config_descriptor, to_documents
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.registry.client import Repository
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: The routes. The first one bakes the state.
ROUTES = ("classic builder", "BuildKit", "podman", "OCI layout", "registry")
#: Name of all images of this benchmark. Podman calls it localhost/NAME.
_NAME = "chatterbox-prewarm-bench"
_DEPS, _COLD = f"{_NAME}:deps", f"{_NAME}:cold"
#: Bytes that podman needs for the image with the packages and for its temporary copy.
_ROOM = 16_000_000_000


def run(checkout: Path, *, names: Sequence[str] = ROUTES, say: Callable[[str], None]) -> dict[str, Any]:
    """Bake once, and add the state to an image by each route.

    Args:
        checkout: checkout of this project.
        names: the routes from `ROUTES` to run; the first one is always run.
        say: called with one line for each step.

    Returns:
        the machine, the engines, and for each route the seconds, the diff ID of the warm layer in the engine, and
        whether the proof of the image passed.

    Raises:
        BadInputError: the checkout has no Dockerfile.
        EngineError: an engine, the registry program or disk space is missing, or a step failed.
    """
    if not (checkout / "Dockerfile").is_file():
        raise BadInputError(f"{checkout} has no Dockerfile", next_step="name a checkout of this project")
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        if (free := shutil.disk_usage(scratch).free) < _ROOM:
            raise EngineError(
                f"{scratch} has {free / 1e9:.0f} GB left, and the routes need about {_ROOM / 1e9:.0f}",
                next_step="free disk space, or set TMPDIR to another folder",
            )
        context = copy_context(checkout, Path(scratch) / "context")
        with contextlib.ExitStack() as stack:
            versions = {}
            for name in ("docker", "podman"):
                engine = stack.enter_context(contextlib.closing(connect(name)))
                versions[name] = engine.info.version
                stack.callback(_remove_images, name)
            routes = _Routes(context=context, scratch=Path(scratch), say=say)
            results = routes.run(names)
            return {"machine": machine(), "engines": versions, "routes": results, "seconds": routes.seconds}


class _Routes:
    """Runs all routes one after another.

    Args:
        context: copy of the checkout.
        scratch: folder for archives, layouts and the state.
        say: called with one line for each step.

    Attributes:
        seconds: duration of each step that is shared by several routes.
    """

    def __init__(self, *, context: Path, scratch: Path, say: Callable[[str], None]) -> None:
        self._context = context
        self._scratch = scratch
        self._say = say
        self._warm = scratch / "warm"
        self.seconds: dict[str, float] = {}

    def run(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the result of each route by its name."""
        results = {}
        with self._timed("the packages, with BuildKit"):
            for packages in ("lean", "full"):
                build(self._context, f"{_DEPS}-{packages}", ["--target", f"deps-{packages}"])
        deps = ("--build-arg", f"DEPS={_DEPS}")
        results["classic builder"] = self._build("classic", *deps, "--builder", "classic", "--route", "dockerfile")
        if "BuildKit" in names:
            results["BuildKit"] = self._build("buildkit")
        if {"podman", "OCI layout", "registry"}.isdisjoint(names):
            return results
        with self._timed("the packages, for podman"):
            # Under both names, to copy gigabytes once: random weights need all packages. So podman's images are full.
            give_to_podman(f"{_DEPS}-full")
            _run("podman", "tag", f"{_DEPS}-full", f"{_DEPS}-lean")
        if "podman" in names:
            results["podman"] = self._build("podman", *deps, engine="podman")
        layout = Layout(self._scratch / "layout")
        base, target = f"oci:{layout.path}:cold", f"oci:{layout.path}:warm"
        with self._timed("the stage cold, with podman"):
            _run("podman", "build", *_build_arguments(*deps), "--target", "cold", "--tag", _COLD, str(self._context))
            _add_base(layout, "cold")
        # Podman derives the name of an image from the path of its layout. A relative path is always a valid name.
        if "OCI layout" in names:
            results["OCI layout"] = self._append("layout", base, target, ["oci:layout:warm"])
        if "registry" in names:
            with registry(self._scratch) as address:
                base, target = f"{address}/{_NAME}:cold", f"{address}/{_NAME}:warm"
                _link_into_registry(layout, self._scratch / "storage", base)
                results["registry"] = self._append("registry", base, target, ["--tls-verify=false", target])
        return results

    def _build(self, name: str, *arguments: str, engine: str = "docker") -> dict[str, Any]:
        """Run `build` for one route. The first route also bakes the state."""
        evidence = self._scratch / f"{name}.evidence.json"
        started = time.monotonic()
        _cli(
            *("build", "--replace", "--engine", engine, "--evidence", str(evidence), "--tag", _tag(name)),
            *("--checkout", str(self._context), "--warm", str(self._warm), "--profile", "eager", "--levels", "1"),
            *_build_arguments(*arguments),
        )
        return self._result(name, engine, evidence, started)

    def _append(self, name: str, base: str, target: str, fetch: Sequence[str]) -> dict[str, Any]:
        """Run `append`, then pull the appended image with podman and prove it."""
        evidence = self._scratch / f"{name}.evidence.json"
        started = time.monotonic()
        self._say(f"append to {target}")
        printed = _cli("append", "--base", base, "--to", target, "--warm", str(self._warm))
        appended = time.monotonic()
        image = _run("podman", "pull", "--quiet", *fetch, cwd=self._scratch).strip()
        _run("podman", "untag", image)
        _run("podman", "tag", image, _tag(name))
        fetched = time.monotonic()
        _cli("prove", "--image", _tag(name), "--engine", "podman", "--evidence", str(evidence))
        sent = re.search(r"(\d+) blobs sent", printed)
        return {
            **self._result(name, "podman", evidence, started),
            "blobs_sent": int(sent[1]) if sent else None,
            "append_seconds": round(appended - started, 1),
            "fetch_seconds": round(fetched - appended, 1),
            "prove_seconds": round(time.monotonic() - fetched, 1),
        }

    def _result(self, name: str, engine: str, evidence: Path, started: float) -> dict[str, Any]:
        """Inspect the image in the engine and read the evidence of its proof."""
        seconds = time.monotonic() - started
        with contextlib.closing(connect(engine)) as connected:
            image = connected.image(_tag(name))
        proof = json.loads(evidence.read_text(encoding="utf-8"))
        result = {
            "engine": engine,
            "warm_layer": image.diff_ids[-1],
            "set_digest": proof["set_digest"],
            "passed": proof["passed"],
            "checks": len(proof["checks"]),
            "seconds": round(seconds, 1),
        }
        self._say(f"{name}: {result['warm_layer']}, {'proven' if result['passed'] else 'NOT PROVEN'}, {seconds:.0f} s")
        return result

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self._say(step)
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 1)


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    return "\n".join(
        f"{name:16} {route['warm_layer']} {'proven' if route['passed'] else 'NOT PROVEN'} {route['seconds']:6.1f} s"
        for name, route in report["routes"].items()
    )


def _tag(name: str) -> str:
    return f"{_NAME}:{name}"


def _build_arguments(*builder_args: str) -> list[str]:
    """Return the arguments of every build: a mini checkpoint, the host network, and the CA bundle if there is one."""
    bundle = "" if "classic" in builder_args else os.environ.get("SSL_CERT_FILE", "")
    secret = ("--secret", f"id=ca,src={bundle}") if bundle else ()
    stages = {"WEIGHTS": "synthetic", "SIZE": "mini", "PACKAGES": "lean"}
    arguments = [word for name, value in stages.items() for word in ("--build-arg", f"{name}={value}")]
    return ["--network=host", *secret, *arguments, *builder_args]


def give_to_podman(image: str) -> None:
    """Copy an image from Docker to podman as one layer with the settings of its Dockerfile.

    This needs half the time and disk space of an archive from `docker save`.

    Raises:
        EngineError: Docker does not have the image, or one of the engines failed.
    """
    settings = json.loads(_run(docker(), "image", "inspect", image))[0]["Config"]
    lines = [f"ENV {variable}" for variable in settings["Env"]]
    lines += [
        f"{word} {json.dumps(value) if isinstance(value, list) else value}"
        for word, value in (
            ("ENTRYPOINT", settings.get("Entrypoint")),
            ("CMD", settings.get("Cmd")),
            ("USER", settings.get("User")),
            ("WORKDIR", settings.get("WorkingDir")),
        )
        if value
    ]
    changes = [word for line in lines for word in ("--change", line)]
    container = _run(docker(), "create", image, "true").strip()
    try:
        exporting = [docker(), "export", container]
        importing = ["podman", "import", "--quiet", *changes, "-", image]
        with subprocess.Popen(exporting, stdout=subprocess.PIPE) as source:
            imported = subprocess.run(importing, stdin=source.stdout, stdout=subprocess.DEVNULL, check=False)
        if source.returncode or imported.returncode:
            raise EngineError(f"{image} cannot be copied to podman", next_step="see the messages of both engines above")
    finally:
        _run(docker(), "rm", container)


def _add_base(layout: Layout, tag: str) -> None:
    """Put podman's stage `cold` into a layout with empty files as layers.

    Podman does not read layers that it already has (`PodmanEngine.load` relies on this, too). So this benchmark need
    not copy gigabytes to test that the new layer arrives.
    """
    with contextlib.closing(connect("podman")) as engine:
        image = engine.image(_COLD)
    document, config, raw = to_documents(image)
    layout.put_blob(config, lambda: contextlib.closing(BytesIO(raw)))
    for layer in image.layers:
        kind, _, name = layer.digest.partition(":")
        (layout.path / "blobs" / kind / name).touch()
    layout.put_manifest(document, tag)


def _link_into_registry(layout: Layout, storage: Path, reference: str) -> None:
    """Add the image of a layout to the storage of a registry with hard links to its blobs.

    The paths are those of the file system driver of distribution (the registry program).
    """
    named = parse(reference)
    document = layout.read_manifest(named.tag)
    image = resolve(layout, named.tag)
    digests = [config_descriptor(document).digest, *(layer.digest for layer in image.layers)]
    root = storage / "docker" / "registry" / "v2"
    for digest in digests:
        kind, _, name = digest.partition(":")
        blob = root / "blobs" / kind / name[:2] / name / "data"
        link = root / "repositories" / named.repository / "_layers" / kind / name / "link"
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            os.link(layout.path / "blobs" / kind / name, blob)
        link.write_text(digest, encoding="ascii")
    with Repository(named) as repository:
        repository.put_manifest(document, named.tag)


def _cli(*arguments: str) -> str:
    return _run(sys.executable, "-m", "chatterbox_prewarm", *arguments)


def _run(*command: str, cwd: Path | None = None) -> str:
    """Run a command in a folder; return its standard output.

    Raises:
        PrewarmError: the command failed.
    """
    finished = run_process(command, cwd=cwd)
    if finished.returncode != 0:
        raise error_with_code(
            finished.returncode, f"{command[0]!r} ended with status {finished.returncode}", "see its message above"
        )
    return finished.stdout


def _remove_images(engine: str) -> None:
    """Remove the image names of this benchmark from an engine."""
    program = docker() if engine == "docker" else "podman"
    listed = run_process([program, "images", "--format", "{{.Repository}}:{{.Tag}}", _NAME]).stdout.split()
    if listed:
        run_process([program, "rmi", "--force", *listed])
