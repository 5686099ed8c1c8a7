"""What an engine is asked before anything else, by a server that answers as engines of other versions do."""

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
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import ROOT, run_cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    answers: dict[str, Any]
    #: What containers were asked for, in its order.
    asked: list[str]


class _Handler(BaseHTTPRequestHandler):
    """Answers a GET with what there is; holds the making, the waiting for and the removing of a container up."""

    server: _Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._hold("create" if "/create" in self.path else "other", 201, {"Id": "c" * 64, "Warnings": []})

    def do_DELETE(self) -> None:
        self._hold("remove", 204, None)

    def _hold(self, doing: str, status: int, answer: object) -> None:
        self.server.asked.append(f"{doing} begins")
        time.sleep(1)
        self.server.asked.append(f"{doing} ends")
        raw = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = self.server.answers.get("/" + path.rpartition("/")[2])
        raw = json.dumps(found if found is not None else {"message": "No such image"}).encode()
        self.send_response(200 if found is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        """No log."""

    def address_string(self) -> str:
        return "a local socket"


@contextlib.contextmanager
def engine_of(version: str, api: str, folder: Path, **info: Any) -> Iterator[str]:
    """What an engine of a version says of itself; its address."""
    with serving(version, api, folder, **info) as server:
        yield f"unix://{server.server_address!s}"


@contextlib.contextmanager
def serving(version: str, api: str, folder: Path, **info: Any) -> Iterator[_Server]:
    """What answers as an engine of a version."""
    path = folder / "engine.sock"
    with _Server(str(path), _Handler) as server:
        server.answers = {
            "/version": {"Version": version, "ApiVersion": api, "MinAPIVersion": "1.12"},
            "/info": {"ServerVersion": version, "DefaultRuntime": "runc", "Runtimes": {"runc": {}}, **info},
        }
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def build(address: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = run_cli(
        *("build", "--tag", "speech:1", "--checkout", str(ROOT), "--warm", str(folder / "warm"), *more),
        env={**os.environ, "DOCKER_HOST": address},
    )
    assert not (folder / "warm").exists()
    return done


@pytest.mark.parametrize(("version", "api"), [("19.03.15", "1.40"), ("18.09.1", "1.39"), ("1.11.2", "1.23")])
def test_an_engine_that_is_too_old_is_refused_before_anything_else(version: str, api: str, tmp_path: Path) -> None:
    with engine_of(version, api, tmp_path) as address:
        refused = build(address, tmp_path)
    assert refused.returncode == 14, refused.stderr
    assert "20.10 is the oldest" in refused.stderr
    assert "upgrade the engine" in refused.stderr


def test_a_gpu_in_a_step_is_what_the_classic_builder_alone_gives(tmp_path: Path) -> None:
    """Of an engine whose default runtime has the GPUs: no build here can get that far."""
    cuda = ("--device", "cuda", "--route", "dockerfile", "--dry-run")
    runtimes = {"DefaultRuntime": "nvidia", "Runtimes": {"runc": {}, "nvidia": {}}}
    with engine_of("20.10.24", "1.41", tmp_path, **runtimes) as address:
        refused = build(address, tmp_path, *cuda)
        assert refused.returncode == 14, refused.stderr
        assert "route export: possible\nroute dockerfile: not here: BuildKit gives a step no GPU" in refused.stdout
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


def test_the_classic_builder_knows_no_secrets(tmp_path: Path) -> None:
    with engine_of("20.10.24", "1.41", tmp_path) as address:
        refused = build(address, tmp_path, "--builder", "classic", "--secret", "id=ca,src=ca.pem")
    assert refused.returncode == 16, refused.stderr
    assert "knows no secrets" in refused.stderr
    assert "--build-arg DEPS=IMAGE" in refused.stderr


@pytest.mark.parametrize("doing", ["create", "remove"])
def test_an_interrupt_while_a_container_is_made_or_removed_leaves_none(doing: str, tmp_path: Path) -> None:
    """An engine is faster than a signal can be sent, so it is a server that takes a second for each."""
    with serving("20.10.24", "1.41", tmp_path) as server:
        container = {"Id": "c" * 64, "Image": "i", "Config": {"Env": []}, "RootFS": {}, "Os": "linux"}
        image = {"Architecture": "amd64", "Created": "2025-01-02T03:04:05Z"}
        server.answers |= {"/json": {**container, **image}, "/history": []}
        command = [sys.executable, "-m", "chatterbox_prewarm", "prove", "--image", "speech:1"]
        environment = {**os.environ, "DOCKER_HOST": f"unix://{server.server_address!s}"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 30
            while f"{doing} begins" not in server.asked and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        asked = server.asked
    assert process.returncode == 130, said
    assert asked[:2] == ["create begins", "create ends"]
    assert asked[-2:] == ["remove begins", "remove ends"]
