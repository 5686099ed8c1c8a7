"""Keep a worker process alive: start it again when it dies, and give up when it cannot become ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import ModelError, PrewarmError, from_os_error
from chatterbox_prewarm.serve.workers.worker_client import WorkerClient
from chatterbox_prewarm.serve.workers.worker_config import spawn

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess

logger = logging.getLogger(__name__)

#: How many processes in a row may end before they are ready. After that the fault is considered permanent.
_MAX_ATTEMPTS = 2
#: Seconds before the next attempt: the system needs time to free the memory of a killed process, mainly GPU memory.
_PAUSE_SECONDS = 5.0
_STOP_SECONDS = 5.0


class Supervisor(WorkerClient):
    """A worker whose process is replaced when it dies.

    Args:
        config: configuration of the worker.
        first: the first process, as `spawn` returned it.
        hang_seconds: a worker that sends no message for this long is killed.
        on_change: called whenever `free`, `ready`, `ended` or `failure` may have changed.
        start: starts each process after the first.
        pause_seconds: pause before the next process when the last one never became ready.

    Attributes:
        restarts: how often a dead process was replaced.
        failure: why there will be no further process; None while there may be one.
        ended: whether there is no process and will be no other, after a failure or after `close`.
    """

    def __init__(
        self,
        config: WorkerConfig,
        first: WorkerProcess,
        *,
        hang_seconds: float,
        on_change: Callable[[], None],
        start: Callable[[WorkerConfig], WorkerProcess] = spawn,
        pause_seconds: float = _PAUSE_SECONDS,
    ) -> None:
        super().__init__(config, first[0], hang_seconds=hang_seconds, on_change=on_change)
        self.restarts = 0
        self.failure: PrewarmError | None = None
        self.ended = False
        self._next = first
        self._start = start
        self._pause_seconds = pause_seconds
        self._closing = asyncio.Event()

    async def run(self) -> None:
        """Keep a worker alive until `close`. Returns early, with `failure` set, when that is impossible."""
        try:
            await self._keep_alive()
        except OSError as error:
            self._fail(from_os_error(error, "starting a worker"))
        finally:
            self.ended = True
            self._on_change()

    async def _keep_alive(self) -> None:
        attempts, ever_ready = 0, False
        while True:
            self._process, connection = self._next
            was_ready = await self._follow(connection)
            status = await self._exit_status()
            if self._closing.is_set():
                return
            ever_ready = ever_ready or was_ready
            attempts = 0 if was_ready else attempts + 1
            if attempts and (failure := self._permanent_failure(attempts, status, ever_ready=ever_ready)):
                self._fail(failure)
                return
            if self._warmup_step is not None:
                logger.error("the %s died during the warm-up of %s", self.config.name, self._warmup_step)
                self.config = replace(self.config, skipped=(*self.config.skipped, self._warmup_step))
            logger.error("the %s ended with status %s; starting another", self.config.name, status)
            if attempts:
                with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), self._pause_seconds)
                    return
            self.restarts += 1
            self._next = self._start(replace(self.config, origin=None))

    def _permanent_failure(self, attempts: int, status: int, *, ever_ready: bool) -> PrewarmError | None:
        """Return why no other process is started after one that did not become ready; None to start another.

        An error that the very first start reports about its input, such as the weights or a state that does not fit,
        is permanent. A later start had the same input, so its error may be transient. Running out of memory always may.
        """
        error, transient = self._start_error or (None, True)
        self.reason = f"it ended with status {status}" if error is None else error.message
        if error is not None and not (transient or ever_ready):
            return error
        if attempts < _MAX_ATTEMPTS:
            return None
        return error or ModelError(
            f"the worker ended {attempts} times before it was ready, last with status {status}",
            next_step="see its output above; if it was killed, give the container more memory",
        )

    def _fail(self, failure: PrewarmError) -> None:
        logger.error("there will be no %s: %s", self.config.name, failure.message)
        self.phase, self.reason, self.failure = "failed", failure.message, failure

    async def _exit_status(self) -> int:
        """Return the exit status of a worker that closed its connection. Kill it if it does not exit in time."""
        try:
            return await asyncio.to_thread(self._process.wait, _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)

    def close(self) -> None:
        """Stop replacing processes that end."""
        self._closing.set()

    async def stop(self) -> None:
        """End the worker. A ready worker gets a few seconds to stop; any other is terminated immediately."""
        self.close()
        process = self._process
        if self.ready:
            with contextlib.suppress(ConnectionError):
                await self._send({"type": "stop"})
        else:
            process.terminate()
        try:
            await asyncio.to_thread(process.wait, _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.error("the worker did not end within %.0f s; killing it", _STOP_SECONDS)  # noqa: TRY400 - no bug here
            process.kill()
