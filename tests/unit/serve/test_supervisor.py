"""Supervision of workers that fail, hang and die. The worker processes are real, but they have no model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec

import pytest

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.serve.workers import audio_buffer
from chatterbox_prewarm.serve.workers.pool import Pool
from chatterbox_prewarm.serve.workers.sentence_split import LIMIT
from chatterbox_prewarm.serve.workers.speech_options import ConversionOptions, SpeechOptions
from chatterbox_prewarm.serve.workers.supervisor import Supervisor
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError
from tests.helpers.stand_in_worker import CONFIG, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig

P = ParamSpec("P")
#: Much longer than the start of an interpreter and the interval between the stand-in's messages.
HANG_SECONDS = 3.0
OPTIONS = SpeechOptions(text="Hello.", seed=1)


@contextlib.asynccontextmanager
async def supervised(*behaviours: str, configs: list[WorkerConfig] | None = None) -> AsyncIterator[Supervisor]:
    """Run a supervisor whose processes have these behaviours, one after the other."""
    start_next = start(*behaviours, configs=configs)
    supervisor = Supervisor(
        CONFIG,
        start_next(CONFIG),
        hang_seconds=HANG_SECONDS,
        on_change=lambda: None,
        start=start_next,
        pause_seconds=0.2,
    )
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        await supervisor.stop()
        await running


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def in_event_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make pytest run an asynchronous test."""

    @functools.wraps(test)
    def run(*args: P.args, **fixtures: P.kwargs) -> None:
        asyncio.run(test(*args, **fixtures))

    return run


@pytest.mark.parametrize("behaviour", ["memory", "dies", "weights"])
@in_event_loop
async def test_a_failed_restart_of_a_worker_that_was_ready_is_retried(behaviour: str) -> None:
    async with supervised("ready", behaviour, "ready") as worker:
        await until(lambda: worker.ready)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.reason)
        assert not worker.ended
        await until(lambda: worker.ready)
        assert (worker.restarts, worker.reason, worker.failure) == (2, None, None)


@in_event_loop
async def test_a_worker_that_fails_twice_before_it_is_ready_is_not_restarted(caplog: pytest.LogCaptureFixture) -> None:
    async with supervised("ready", "dies", "memory") as worker:
        await until(lambda: worker.ready)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.ended)
        assert worker.failure is not None
        assert (worker.phase, worker.reason, worker.failure.exit_code) == ("failed", "out of memory", 15)
    async with supervised("dies", "dies") as worker:
        await until(lambda: worker.ended)
        assert worker.reason == "the worker ended 2 times before it was ready, last with status 3"
    assert "there will be no worker english cpu: out of memory" in caplog.text


@in_event_loop
async def test_an_input_error_of_the_first_start_is_permanent() -> None:
    async with supervised("weights") as worker:
        await until(lambda: worker.ended)
        assert isinstance(worker.failure, WeightsError)
        assert (worker.restarts, worker.reason) == (0, "the weights are gone")


@in_event_loop
async def test_a_first_start_without_enough_memory_is_retried() -> None:
    async with supervised("memory", "ready") as worker:
        await until(lambda: worker.ready)
        assert worker.restarts == 1


@in_event_loop
async def test_close_during_the_pause_before_a_restart_prevents_the_restart() -> None:
    async with supervised("dies") as worker:
        await until(lambda: worker.reason)
        worker.close()
        await until(lambda: worker.ended)
        assert worker.failure is None


@in_event_loop
async def test_a_worker_that_is_silent_during_its_start_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with supervised("silent", "ready") as worker:
        began = time.monotonic()
        await until(lambda: worker.ready)
        assert time.monotonic() - began >= HANG_SECONDS
        assert worker.restarts == 1
    assert "hangs (starting)" in caplog.text


@in_event_loop
async def test_a_suspended_idle_worker_is_replaced_and_a_running_one_is_not() -> None:
    async with supervised("ready", "ready") as worker:
        await until(lambda: worker.ready)
        first = worker.pid
        await asyncio.sleep(1.5 * HANG_SECONDS)
        assert (worker.pid, worker.ready) == (first, True)
        os.kill(first, signal.SIGSTOP)
        await until(lambda: worker.pid != first and worker.ready)
        assert worker.restarts == 1


@in_event_loop
async def test_a_running_worker_is_killed_when_its_request_gets_no_answer() -> None:
    async with supervised("stuck", "ready") as worker:
        await until(lambda: worker.ready)
        worker.reserve()
        with pytest.raises(WorkerGoneError, match="hung"):
            await anext(worker.speak(OPTIONS))
        await until(lambda: worker.free)


@in_event_loop
async def test_workers_are_kept_when_the_front_itself_was_suspended() -> None:
    """After a debugger or a paused container, the messages that arrived during the pause are still unread."""
    async with supervised("ready") as worker:
        await until(lambda: worker.ready)
        time.sleep(1.5 * HANG_SECONDS)
        # The blocking sleep simulates the pause, in which no task of this process runs.
        await asyncio.sleep(HANG_SECONDS / 2)
        assert worker.ready


@in_event_loop
async def test_the_next_worker_skips_the_warm_up_step_that_killed_the_last_one() -> None:
    configs: list[WorkerConfig] = []
    async with supervised("warming", "ready", "ready", configs=configs) as worker:
        await until(lambda: worker.ready and worker.restarts == 1)
        os.kill(worker.pid, signal.SIGKILL)
        await until(lambda: worker.ready and worker.restarts == 2)
    assert [config.skipped for config in configs] == [(), ("100 speech tokens",), ("100 speech tokens",)]


async def spoken(pool: Pool) -> bytes:
    return b"".join([chunk.pcm async for chunk in pool.speak(OPTIONS)])


async def converted(pool: Pool, source: bytes) -> bytes:
    return b"".join([chunk.pcm async for chunk in pool.speak(ConversionOptions(source=source))])


@contextlib.asynccontextmanager
async def running_pool(*behaviours: str) -> AsyncIterator[Pool]:
    """Run a pool with one worker for each behaviour."""
    workers = [(CONFIG, start(behaviour)(CONFIG)) for behaviour in behaviours]
    pool = Pool(workers, wait_seconds=600, hang_seconds=600)
    running = asyncio.create_task(pool.run())
    try:
        yield pool
    finally:
        await pool.stop()
        await running


@in_event_loop
async def test_queued_requests_fail_at_once_when_the_last_worker_dies_during_a_drain() -> None:
    async with running_pool("stuck") as pool:
        await until(lambda: pool.ready)
        requests = [asyncio.create_task(spoken(pool)) for _ in range(3)]
        await until(lambda: pool.waiting == 2)
        pool.close()
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        # Far less than the time that a request may wait for a worker.
        answers = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 60)
        assert all(isinstance(answer, WorkerGoneError) for answer in answers), answers


@in_event_loop
async def test_another_worker_retries_the_request_of_a_worker_that_died_during_a_drain() -> None:
    async with running_pool("stuck", "ready") as pool:
        await until(lambda: all(worker.ready for worker in pool.workers))
        requests = [asyncio.create_task(spoken(pool)) for _ in range(3)]
        await until(lambda: sum(request.done() for request in requests) == 2)
        pool.close()
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        assert await asyncio.gather(*requests) == [b"Hello."] * 3


@in_event_loop
async def test_the_next_worker_converts_the_speech_of_a_worker_that_died() -> None:
    async with running_pool("stuck", "ready") as pool:
        await until(lambda: all(worker.ready for worker in pool.workers))
        requests = [asyncio.create_task(converted(pool, source)) for source in (b"one", b"two", b"three")]
        await until(lambda: sum(request.done() for request in requests) == 2)
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        assert await asyncio.gather(*requests) == [b"one", b"two", b"three"]


@in_event_loop
async def test_the_failure_of_one_of_two_workers_is_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with running_pool("weights", "ready") as pool:
        await until(lambda: pool.ready and pool.workers[0].ended)
        assert pool.failure is None
        assert pool.workers[0].reason == "the weights are gone"
        assert await spoken(pool) == b"Hello."
    assert "there will be no worker english cpu: the weights are gone" in caplog.text


@in_event_loop
async def test_a_long_text_is_spoken_only_a_limited_amount_ahead_of_a_slow_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("regex")
    pytest.importorskip("sentencex")
    monkeypatch.setattr(audio_buffer, "_REQUEST_BYTES", 20 * LIMIT)
    parts: list[float] = []
    complete = asyncio.Event()
    async with running_pool("ready") as pool:
        await until(lambda: pool.ready)
        pool.on_part = lambda _, seconds: parts.append(seconds)
        stream = pool.speak(replace(OPTIONS, text="x" * 40 * LIMIT), on_complete=complete.set)
        chunks = [await anext(stream)]
        await until(lambda: len(parts) == 21)
        for _ in range(3):  # the worker takes one part of a text after another, so a 22nd part would be among these
            assert await spoken(pool) == b"Hello."
        assert len(parts) == 21 + 3
        assert pool.backlog.size == 20 * LIMIT
        while len(chunks) < 20:
            chunks.append(await anext(stream))
        await complete.wait()
        assert len(parts) == 40 + 3, "the last part is spoken before the client has read it"
        assert len(chunks + [chunk async for chunk in stream]) == 40
        assert pool.backlog.size == 0
