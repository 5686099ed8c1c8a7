"""A worker that is idle, and the errors that make a worker unusable. No model is loaded."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.warmup.adaptive import WarmupStep
from chatterbox_prewarm.serve.workers import messages
from chatterbox_prewarm.serve.workers.fatal_errors import is_fatal
from chatterbox_prewarm.serve.workers.messages import PROGRESS_SECONDS
from chatterbox_prewarm.serve.workers.worker import Worker
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig, for_devices, parse_devices
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.state.signature import Trust
from tests.helpers.stand_in_worker import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class IdleWorker:
    """A worker without a model that runs in a thread, and the front's side of its connection."""

    def __init__(self, *steps: WarmupStep) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(30)
        self._theirs = theirs
        self.worker = Worker(CONFIG, theirs)
        self.worker._warmup_steps = list(steps)
        self.status: int | str | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.worker.serve()
        except SystemExit as ended:
            self.status = ended.code

    def close(self) -> None:
        self.connection.close()
        for thread in threading.enumerate():
            if thread.name in {"request queue", "alive"}:
                thread.join(30)
        self._theirs.close()

    def next(self) -> dict[str, Any]:
        message = messages.receive(self.connection)
        assert message is not None
        return {name: value for name, value in message[0].items() if name not in {"metrics", "usage"}}

    def end(self) -> int | str | None:
        self.connection.sendall(messages.encode({"type": "stop"}))
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.status


@pytest.fixture
def start_idle() -> Iterator[Callable[..., IdleWorker]]:
    workers: list[IdleWorker] = []

    def start(*steps: WarmupStep) -> IdleWorker:
        workers.append(IdleWorker(*steps))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def failing_step(error: Exception) -> WarmupStep:
    def run(_: Callable[[], None]) -> None:
        raise error

    return WarmupStep(name="100 speech tokens", run=run)


STEP_BEGUN = {"type": "warming", "step": "100 speech tokens"}


def test_a_failed_warm_up_step_is_logged_and_the_next_step_runs(
    start_idle: Callable[..., IdleWorker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = start_idle(failing_step(ValueError("a fault")), WarmupStep(name="a voice from a clip", run=lambda _: None))
    assert [worker.next() for _ in range(4)] == [
        STEP_BEGUN,
        {"type": "warming", "step": None},
        {"type": "warming", "step": "a voice from a clip"},
        {"type": "warmed"},
    ]
    assert worker.end() is None
    assert "the warm-up of 100 speech tokens failed and is skipped" in caplog.text
    assert "ValueError: a fault" in caplog.text


def test_a_fatal_error_in_a_warm_up_step_ends_the_worker(
    start_idle: Callable[..., IdleWorker],
) -> None:
    worker = start_idle(failing_step(torch.OutOfMemoryError("CUDA out of memory")))
    assert worker.next() == STEP_BEGUN
    assert worker.end() == 15


def test_a_worker_reports_every_second_that_it_is_alive(start_idle: Callable[..., IdleWorker]) -> None:
    worker = start_idle()
    threading.Thread(target=worker.worker.report_alive, name="alive", daemon=True).start()
    assert [worker.next() for _ in range(2)] == [{"type": "alive"}] * 2
    assert PROGRESS_SECONDS <= 1
    worker.end()


def test_a_configuration_is_the_same_after_its_way_to_the_worker(tmp_path: Path) -> None:
    trust = Trust(key=tmp_path / "key.pem", expected_digest="sha256:" + "1" * 64)
    start = StartOptions(warm=tmp_path / "warm", weights=tmp_path, cache=tmp_path / "cache", trust=trust)
    config = WorkerConfig(start=start, voices={"ann": tmp_path / "ann.wav"}, voice_directory=tmp_path, threads=2)
    assert WorkerConfig.from_json(config.to_json()) == config
    assert WorkerConfig.from_json(CONFIG.to_json()).start == CONFIG.start


def test_workers_on_the_cpu_divide_its_cores_unless_threads_are_given() -> None:
    cores = len(os.sched_getaffinity(0))
    workers = for_devices(parse_devices("cpu, cpu,cuda:1"), CONFIG)
    assert [worker.device for worker in workers] == ["cpu", "cpu", "cuda:1"]
    assert [worker.threads for worker in workers] == [max(1, cores // 2)] * 2 + [None]
    assert [worker.threads for worker in for_devices(["cpu"], CONFIG)] == [None]
    assert {worker.threads for worker in for_devices(["cpu", "cpu"], replace(CONFIG, threads=3))} == {3}


def test_an_empty_list_of_devices_is_refused() -> None:
    with pytest.raises(BadInputError, match="names no device"):
        parse_devices(" , ")


def test_an_invalid_load_ends_the_start_with_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BadInputError, match="requests per minute"):
        Worker(replace(CONFIG, requests_per_minute=float("nan")), theirs).start()


#: PyTorch's error for a fault of a CUDA kernel. It has its own class since PyTorch 2.8.
AcceleratorError: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("unable to mmap 4618 bytes from file <s3gen.safetensors>: Cannot allocate memory (12)"), True),
        (
            caused_by(ModelError("no voice", next_step="-"), RuntimeError("CUDA error: unspecified launch failure")),
            True,
        ),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("CUDA error: only in the text"), False),
        (caused_by(ModelError("no voice", next_step="-"), ValueError("too short")), False),
    ],
    ids=str,
)
def test_only_device_and_memory_errors_are_fatal(error: Exception, *, fatal: bool) -> None:
    assert is_fatal(error) == fatal
