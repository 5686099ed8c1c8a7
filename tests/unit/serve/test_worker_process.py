"""Test worker processes that start before their configuration is known. No model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.errors import IntegrityError, WeightsError
from chatterbox_prewarm.serve.workers import messages
from chatterbox_prewarm.serve.workers.worker_config import spawn, spawn_all
from chatterbox_prewarm.serve.workers.worker_process import start_process
from chatterbox_prewarm.system.children import PARENT, TOKEN
from tests.helpers.stand_in_worker import CONFIG
from tests.helpers.states import record_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess

#: Prints the order in which `serve` starts and configures a worker and imports packages, as JSON, when it ends.
_ORDER = """
import atexit, json, sys
events, modules = [], {"click", "chatterbox_prewarm.serve.http.server"}
def note(event, arguments):
    if event == "subprocess.Popen" and "chatterbox_prewarm.serve.workers" in arguments[1]:
        events.append("worker")
    elif event == "import" and arguments[0] in modules:
        events.append(arguments[0])
sys.addaudithook(note)
atexit.register(lambda: print(json.dumps(list(dict.fromkeys(events)))))
from chatterbox_prewarm.serve.workers import worker_config
spawn = worker_config.spawn
worker_config.spawn = lambda *arguments: [spawn(*arguments), events.append("configuration")][0]
from chatterbox_prewarm.__main__ import main
main()
"""


@pytest.fixture
def waiting() -> Iterator[WorkerProcess]:
    """Start a process that waits for its configuration."""
    process, connection = start_process()
    connection.settimeout(60)
    yield process, connection
    connection.close()
    process.kill()
    process.wait()


def test_a_waiting_process_gets_its_configuration_and_reports_the_start(waiting: WorkerProcess, tmp_path: Path) -> None:
    config = replace(CONFIG, start=replace(CONFIG.start, weights=tmp_path / "missing"))
    [(_, started)] = spawn_all([config], waiting)
    assert started == waiting
    process, connection = waiting
    received = []
    while (message := messages.receive(connection)) is not None:
        received.append(message[0])
    failed = next(header for header in received if header["type"] == "failed")
    assert failed["exit_code"] == WeightsError.exit_code
    assert str(tmp_path / "missing") in failed["error"]
    assert process.wait(60) == WeightsError.exit_code


def test_only_the_first_of_several_workers_uses_the_waiting_process(waiting: WorkerProcess) -> None:
    first, second = spawn_all([CONFIG, CONFIG], waiting)
    try:
        assert first[1] == waiting
        assert second[1][0].pid != waiting[0].pid
    finally:
        second[1][0].kill()
        second[1][0].wait()
        second[1][1].close()


def test_a_process_without_a_configuration_ends_when_the_front_closes_the_connection(waiting: WorkerProcess) -> None:
    process, connection = waiting
    connection.close()
    assert process.wait(60) == 0


def test_a_waiting_process_that_has_ended_is_left_to_its_supervisor(waiting: WorkerProcess) -> None:
    waiting[0].kill()
    waiting[0].wait()
    assert spawn(CONFIG, waiting) == waiting


def test_a_worker_does_not_inherit_the_token_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "a secret")
    process, connection = start_process()
    try:
        while not (environment := Path(f"/proc/{process.pid}/environ").read_bytes()):
            assert process.poll() is None  # until the system call that executes the program has ended
    finally:
        connection.close()
        process.wait(60)
    names = {entry.partition(b"=")[0].decode() for entry in environment.split(b"\0")}
    assert PARENT in names
    assert TOKEN not in names


def order_of(*arguments: str) -> tuple[int, list[str]]:
    """Run the command line; return its exit code and the order of events."""
    done = subprocess.run([sys.executable, "-c", _ORDER, *arguments], capture_output=True, text=True, check=False)
    events: list[str] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, events


def test_serve_starts_and_configures_its_worker_before_it_imports_packages(tmp_path: Path) -> None:
    record_weights(tmp_path / "weights")
    arguments = ("--weights", tmp_path / "weights", "--warm", tmp_path / "warm", "--cache", tmp_path / "cache")
    code, events = order_of("serve", *map(str, arguments), "--policy", "require", "--port", str(free_port()))
    assert code == IntegrityError.exit_code
    assert events == ["worker", "click", "configuration", "chatterbox_prewarm.serve.http.server"]


@pytest.mark.parametrize("arguments", [("serve", "--help"), ("verify", "--help"), ("--version",)])
def test_no_worker_starts_when_nothing_is_served(arguments: tuple[str, ...]) -> None:
    code, events = order_of(*arguments)
    assert code == 0
    assert events == ["click"]
