"""Workers that fail, hang and die, without a model: real processes with what a worker says, and nothing behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.serve.workers.messages import PartOrder
from chatterbox_prewarm.serve.workers.pool import Pool, PoolConfig
from chatterbox_prewarm.serve.workers.speech_options import SpeechOrder
from chatterbox_prewarm.serve.workers.supervisor import Supervisor, WorkerGoneError
from tests.helpers.stand_in_worker import CONFIG, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from chatterbox_prewarm.serve.workers.worker import WorkerConfig

#: Long beside the interval of the stand-in's reports and the start of an interpreter.
HANG_SECONDS = 3.0
PART = PartOrder(text="Hello.", voice="default", seed=1, max_new_tokens=10)


@contextlib.asynccontextmanager
async def supervised(*parts: str, seen: list[WorkerConfig] | None = None) -> AsyncIterator[Supervisor]:
    """A supervisor whose workers play these parts in turn."""
    begin = start(*parts, seen=seen)
    supervisor = Supervisor(
        CONFIG, begin(CONFIG), hang_seconds=HANG_SECONDS, on_change=lambda: None, start=begin, pause_seconds=0.2
    )
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        await supervisor.stop()
        await running


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        await test

    asyncio.run(main())


@pytest.mark.parametrize("part", ["memory", "dies", "weights"])
def test_a_start_that_failed_after_one_that_was_ready_is_tried_once_more(part: str) -> None:
    async def test() -> None:
        async with supervised("ready", part, "ready") as worker:
            await until(lambda: worker.ready)
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: worker.reason)
            assert not worker.ended
            await until(lambda: worker.ready)
            assert (worker.restarts, worker.reason, worker.failure) == (2, None, None)

    run(test())


def test_a_worker_that_fails_twice_before_it_was_ready_is_not_started_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with supervised("ready", "dies", "memory") as worker:
            await until(lambda: worker.ready)
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: worker.ended)
            assert worker.failure is not None
            assert (worker.phase, worker.reason, worker.failure.exit_code) == ("failed", "out of memory", 15)
        async with supervised("dies", "dies") as worker:
            await until(lambda: worker.ended)
            assert worker.reason == "the worker ended 2 times before it was ready, last with status 3"

    run(test())
    assert "there will be no worker on cpu: out of memory" in caplog.text


def test_what_the_first_start_says_of_its_input_is_final() -> None:
    async def test() -> None:
        async with supervised("weights") as worker:
            await until(lambda: worker.ended)
            assert isinstance(worker.failure, WeightsError)
            assert (worker.restarts, worker.reason) == (0, "the weights are gone")

    run(test())


def test_a_want_of_memory_at_the_first_start_may_pass() -> None:
    async def test() -> None:
        async with supervised("memory", "ready") as worker:
            await until(lambda: worker.ready)
            assert worker.restarts == 1

    run(test())


def test_no_worker_comes_after_a_close_while_the_next_start_is_waited_for() -> None:
    async def test() -> None:
        async with supervised("dies") as worker:
            await until(lambda: worker.reason)
            worker.close()
            await until(lambda: worker.ended)
            assert worker.failure is None

    run(test())


def test_a_worker_that_says_nothing_in_its_start_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with supervised("silent", "ready") as worker:
            began = time.monotonic()
            await until(lambda: worker.ready)
            assert HANG_SECONDS <= time.monotonic() - began < 3 * HANG_SECONDS
            assert worker.restarts == 1

    run(test())
    assert "hangs (starting)" in caplog.text


def test_an_idle_worker_that_is_stopped_is_replaced_and_one_that_runs_is_not() -> None:
    async def test() -> None:
        async with supervised("ready", "ready") as worker:
            await until(lambda: worker.ready)
            first = worker.pid
            await asyncio.sleep(1.5 * HANG_SECONDS)
            assert (worker.pid, worker.ready) == (first, True)
            os.kill(first, signal.SIGSTOP)
            await until(lambda: worker.pid != first and worker.ready)
            assert worker.restarts == 1

    run(test())


def test_a_busy_worker_is_ended_when_its_request_hears_nothing_though_it_runs() -> None:
    async def test() -> None:
        async with supervised("stuck", "ready") as worker:
            await until(lambda: worker.ready)
            worker.take()
            with pytest.raises(WorkerGoneError, match="hung"):
                await anext(worker.speak(PART))
            await until(lambda: worker.free)

    run(test())


def test_the_front_that_was_stopped_itself_blames_no_worker() -> None:
    """A debugger, a paused container: when it goes on, what the worker said meanwhile is still to be read."""

    async def test() -> None:
        async with supervised("ready") as worker:
            await until(lambda: worker.ready)
            time.sleep(1.5 * HANG_SECONDS)
            # As then, nothing of this process ran meanwhile.
            await asyncio.sleep(HANG_SECONDS / 2)
            assert worker.ready

    run(test())


def test_a_step_of_the_idle_warm_up_that_killed_a_worker_is_skipped_by_the_next() -> None:
    async def test() -> None:
        seen: list[WorkerConfig] = []
        async with supervised("warming", "ready", "ready", seen=seen) as worker:
            await until(lambda: worker.ready and worker.restarts == 1)
            os.kill(worker.pid, signal.SIGKILL)
            await until(lambda: worker.ready and worker.restarts == 2)
        assert [config.skipped for config in seen] == [(), ("100 speech tokens",), ("100 speech tokens",)]

    run(test())


def order() -> SpeechOrder:
    return SpeechOrder(text="Hello.", voice="default", format="pcm", seed=1)


async def spoken(pool: Pool) -> bytes:
    return b"".join([chunk.pcm async for chunk in pool.speak(order())])


def test_those_in_line_are_told_at_once_when_the_last_worker_dies_during_a_drain() -> None:
    async def test() -> None:
        pool = Pool(PoolConfig(wait_seconds=60, hang_seconds=60), [(CONFIG, start("stuck")(CONFIG))])
        running = asyncio.create_task(pool.run())
        await until(lambda: pool.ready)
        requests = [asyncio.create_task(spoken(pool)) for _ in range(3)]
        await until(lambda: pool.waiting == 2)
        pool.close()
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        began = time.monotonic()
        answers = await asyncio.gather(*requests, return_exceptions=True)
        assert time.monotonic() - began < 5
        assert all(isinstance(answer, WorkerGoneError) for answer in answers), answers
        await running

    run(test())


def test_a_worker_that_goes_on_takes_over_what_another_died_of_during_a_drain() -> None:
    async def test() -> None:
        workers = [(CONFIG, start(part)(CONFIG)) for part in ("stuck", "ready")]
        pool = Pool(PoolConfig(wait_seconds=60, hang_seconds=60), workers)
        running = asyncio.create_task(pool.run())
        await until(lambda: all(worker.ready for worker in pool.workers))
        requests = [asyncio.create_task(spoken(pool)) for _ in range(3)]
        await until(lambda: sum(request.done() for request in requests) == 2)
        pool.close()
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        assert await asyncio.gather(*requests) == [b"Hello."] * 3
        await pool.stop()
        await running

    run(test())


def test_the_failure_of_one_of_two_workers_is_logged_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    async def test() -> None:
        workers = [(CONFIG, start(part)(CONFIG)) for part in ("weights", "ready")]
        pool = Pool(PoolConfig(wait_seconds=60, hang_seconds=60), workers)
        running = asyncio.create_task(pool.run())
        await until(lambda: pool.ready and pool.workers[0].ended)
        assert pool.failure is None
        assert pool.workers[0].reason == "the weights are gone"
        assert await spoken(pool) == b"Hello."
        pool.close()
        await pool.stop()
        await running

    run(test())
    assert "there will be no worker on cpu: the weights are gone" in caplog.text
