"""What a worker does when nobody asks for anything, and what breaks one; without a model."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.warmup.adaptive import WarmupStep
from chatterbox_prewarm.serve.workers import frames
from chatterbox_prewarm.serve.workers.fatal_errors import is_broken
from chatterbox_prewarm.serve.workers.messages import PROGRESS_SECONDS
from chatterbox_prewarm.serve.workers.worker import Worker
from tests.helpers.stand_in_worker import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Idle:
    """A worker that was started without a model, in a thread, and this side of its connection."""

    def __init__(self, *steps: WarmupStep) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(30)
        self._theirs = theirs
        self.worker = Worker(CONFIG, theirs)
        self.worker._steps = list(steps)
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
            if thread.name in {"inbox", "alive"}:
                thread.join(30)
        self._theirs.close()

    def next(self) -> dict[str, Any]:
        message = frames.receive(self.connection)
        assert message is not None
        return {name: value for name, value in message[0].items() if name not in {"metrics", "usage"}}

    def end(self) -> int | str | None:
        self.connection.sendall(frames.encode({"type": "stop"}))
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.status


@pytest.fixture
def idle() -> Iterator[Callable[..., Idle]]:
    workers: list[Idle] = []

    def start(*steps: WarmupStep) -> Idle:
        workers.append(Idle(*steps))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def failing(error: Exception) -> WarmupStep:
    def run(_: Callable[[], None]) -> None:
        raise error

    return WarmupStep(name="100 speech tokens", run=run)


BEGUN = {"type": "warming", "step": "100 speech tokens"}


def test_a_step_that_fails_is_logged_and_given_up_and_the_next_is_taken(
    idle: Callable[..., Idle], caplog: pytest.LogCaptureFixture
) -> None:
    worker = idle(failing(ValueError("a fault")), WarmupStep(name="a voice from a clip", run=lambda _: None))
    assert [worker.next() for _ in range(4)] == [
        BEGUN,
        {"type": "warming", "step": None},
        {"type": "warming", "step": "a voice from a clip"},
        {"type": "warmed"},
    ]
    assert worker.end() is None
    assert "the warm-up of 100 speech tokens is given up" in caplog.text
    assert "ValueError: a fault" in caplog.text


def test_a_step_that_breaks_the_worker_ends_it_with_the_step_still_begun(idle: Callable[..., Idle]) -> None:
    worker = idle(failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert worker.next() == BEGUN
    assert worker.end() == 15


def test_a_worker_says_every_second_that_it_runs_and_what_it_vouches_for(idle: Callable[..., Idle]) -> None:
    worker = idle()
    threading.Thread(target=worker.worker.report_alive, name="alive", daemon=True).start()
    assert worker.next() == {"type": "alive"}
    worker.worker._vouched = (7, float("inf"))
    assert worker.next() == {"type": "progress", "id": 7}
    worker.worker._vouched = (7, 0.0)
    assert worker.next() == {"type": "alive"}
    assert PROGRESS_SECONDS <= 1
    worker.end()


def test_a_load_that_cannot_be_ends_the_start_and_not_the_idle_worker() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BadInputError, match="requests a minute"):
        Worker(replace(CONFIG, requests_per_minute=float("nan")), theirs).start()


#: What PyTorch raises for a fault of a kernel: a kind of its own since 2.8.
AcceleratorError: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (caused(ModelError("no voice", next_step="-"), RuntimeError("CUDA error: unspecified launch failure")), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("CUDA error: so it says"), False),
        (caused(ModelError("no voice", next_step="-"), ValueError("too short")), False),
    ],
    ids=str,
)
def test_what_breaks_a_worker(error: Exception, *, broken: bool) -> None:
    assert is_broken(error) == broken
