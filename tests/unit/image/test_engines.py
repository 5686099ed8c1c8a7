"""Checks of the Docker engine, against a server that answers like engines of other versions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.image.build_request import BuildRequest
from tests.conftest import ROOT, run_cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


MODELS = ("--build-arg", "VARIANT=english,multilingual")


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    answers: dict[str, Any]
    #: Begin and end of each request that creates or removes a container, in order.
    calls: list[str]


class _Handler(BaseHTTPRequestHandler):
    """Answer a GET from `answers`; take a second to create, start or remove a container."""

    server: _Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer_slowly("create" if "/create" in self.path else "other", 201, {"Id": "c" * 64, "Warnings": []})

    def do_DELETE(self) -> None:
        self._answer_slowly("remove", 204, None)

    def _answer_slowly(self, action: str, status: int, answer: object) -> None:
        self.server.calls.append(f"{action} begins")
        time.sleep(1)
        self.server.calls.append(f"{action} ends")
        raw = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answer = self.server.answers.get("/" + path.rpartition("/")[2])
        raw = json.dumps(answer if answer is not None else {"message": "No such image"}).encode()
        self.send_response(200 if answer is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def address_string(self) -> str:
        return "a local socket"


@contextlib.contextmanager
def engine_of(version: str, api: str, folder: Path, **info: Any) -> Iterator[str]:
    """Serve the description of an engine of this version; yield its address."""
    with serving(version, api, folder, **info) as server:
        yield f"unix://{server.server_address!s}"


@contextlib.contextmanager
def serving(version: str, api: str, folder: Path, **info: Any) -> Iterator[_Server]:
    """Serve the description of an engine of this version; yield the server."""
    path = folder / "engine.sock"
    with _Server(str(path), _Handler) as server:
        server.answers = {
            "/version": {"Version": version, "ApiVersion": api, "MinAPIVersion": "1.12"},
            "/info": {"ServerVersion": version, "DefaultRuntime": "runc", "Runtimes": {"runc": {}}, **info},
        }
        server.calls = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def build(address: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    finished = run_cli(
        *("build", "--tag", "speech:1", "--checkout", str(ROOT), "--warm", str(folder / "warm"), *more),
        env={**os.environ, "DOCKER_HOST": address},
    )
    assert not (folder / "warm").exists()
    return finished


@pytest.mark.parametrize(("version", "api"), [("19.03.15", "1.40"), ("18.09.1", "1.39"), ("1.11.2", "1.23")])
def test_an_engine_that_is_too_old_is_refused_before_the_build(version: str, api: str, tmp_path: Path) -> None:
    with engine_of(version, api, tmp_path) as address:
        refused = build(address, tmp_path)
    assert refused.returncode == 14, refused.stderr
    assert "the Dockerfile needs 20.10" in refused.stderr
    assert "upgrade Docker" in refused.stderr


def test_only_the_classic_builder_gives_a_step_a_gpu(tmp_path: Path) -> None:
    """Uses an engine whose default runtime is `nvidia`, and a dry run, because a real build needs a GPU."""
    cuda = ("--device", "cuda", "--route", "dockerfile", "--dry-run")
    runtimes = {"DefaultRuntime": "nvidia", "Runtimes": {"runc": {}, "nvidia": {}}}
    with engine_of("20.10.24", "1.41", tmp_path, **runtimes) as address:
        refused = build(address, tmp_path, *cuda)
        assert refused.returncode == 14, refused.stderr
        assert "route export: possible\nroute dockerfile: not possible: BuildKit gives a step no GPU" in refused.stdout
        assert "use --builder classic" in refused.stderr
        shown = build(address, tmp_path, *cuda, "--builder", "classic", "--build-arg", "DEPS=speech:deps")
    assert shown.returncode == 0, shown.stderr
    assert "route dockerfile: possible" in shown.stdout
    (bake,) = [line for line in shown.stdout.splitlines() if "--target bake" in line]
    printed, _, built = bake.partition(" | ")
    assert printed.split() == [
        *("chatterbox-prewarm", "dockerfile", "--for", "classic", "--checkout", str(ROOT)),
        *("--build-arg", "DEPS=speech:deps", "--target", "bake"),
    ]
    assert "DOCKER_BUILDKIT=0" in built
    assert "--file=-" in built


def test_the_bake_in_a_container_shows_its_steps(tmp_path: Path) -> None:
    """It has no terminal, so it shows them only with an option, which stands before the command."""
    with engine_of("28.2.2", "1.50", tmp_path) as address:
        shown = build(address, tmp_path, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "in a container of that image: --progress bake --device cpu" in shown.stdout


@pytest.mark.parametrize(("more", "reused"), [((), True), (("--rebake",), False), (MODELS, False)])
def test_the_plan_promises_a_stored_state_only_where_the_build_can_reuse_it(
    more: tuple[str, ...], reused: bool, tmp_path: Path
) -> None:
    with engine_of("28.2.2", "1.50", tmp_path) as address:
        shown = build(address, tmp_path, "--dry-run", *more)
    assert shown.returncode == 0, shown.stderr
    assert ("if it has the same recipe" in shown.stdout) is reused
    assert ("state: a new bake" in shown.stdout) is not reused


def test_the_plan_of_a_dry_run_is_also_json(tmp_path: Path) -> None:
    with engine_of("28.2.2", "1.50", tmp_path) as address:
        shown = build(address, tmp_path, "--dry-run")
        document = json.loads(build(address, tmp_path, "--dry-run", "--json").stdout)
    assert document["routes"][0] == "route export: possible"
    (plan,) = document["plans"]
    assert plan["tag"] == "speech:1"
    assert [*document["routes"], *plan["steps"]] == shown.stdout.splitlines()


def test_only_a_state_that_the_next_build_reuses_needs_rebake() -> None:
    request = BuildRequest(
        checkout=ROOT,
        tag="speech:1",
        warm=ROOT / "out" / "warm",
        device="cpu",
        route="export",
        builder="buildkit",
        profile="aot",
        t3_dtype="float32",
        levels="1",
        voices={},
        arguments={},
        secrets=(),
        network="default",
        replacing=False,
        rebake=True,
    )
    assert "--rebake" in request.rebake_hint()
    several = replace(request, arguments={"VARIANT": "english,multilingual"})
    assert several.rebake_hint() == "build again on this kind of machine"


def test_an_image_for_the_profile_compiled_needs_all_packages(tmp_path: Path) -> None:
    compiled = ("--profile", "compiled", "--dry-run")
    with engine_of("28.2.2", "1.50", tmp_path) as address:
        refused = build(address, tmp_path, *compiled)
        allowed = build(address, tmp_path, *compiled, "--build-arg", "PACKAGES=full")
    assert refused.returncode == 16, refused.stderr
    assert "add --build-arg PACKAGES=full" in refused.stderr
    assert allowed.returncode == 0, allowed.stderr


def test_the_classic_builder_refuses_secrets(tmp_path: Path) -> None:
    with engine_of("20.10.24", "1.41", tmp_path) as address:
        refused = build(address, tmp_path, "--builder", "classic", "--secret", "id=ca,src=ca.pem")
    assert refused.returncode == 16, refused.stderr
    assert "does not support secrets" in refused.stderr
    assert "--build-arg DEPS=IMAGE" in refused.stderr


@pytest.mark.parametrize("action", ["create", "remove"])
def test_an_interrupt_while_a_container_is_created_or_removed_leaves_no_container(action: str, tmp_path: Path) -> None:
    """Uses a server that takes a second for each call, because a real engine is faster than a signal."""
    with serving("20.10.24", "1.41", tmp_path) as server:
        container = {"Id": "c" * 64, "Image": "i", "Config": {"Env": []}, "RootFS": {}, "Os": "linux"}
        image = {"Architecture": "amd64", "Created": "2025-01-02T03:04:05Z"}
        server.answers |= {"/json": {**container, **image}, "/history": []}
        command = [sys.executable, "-m", "chatterbox_prewarm", "prove", "--image", "speech:1"]
        environment = {**os.environ, "DOCKER_HOST": f"unix://{server.server_address!s}"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 30
            while f"{action} begins" not in server.calls and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        calls = server.calls
    assert process.returncode == 130, stderr
    assert calls[:2] == ["create begins", "create ends"]
    assert calls[-2:] == ["remove begins", "remove ends"]
