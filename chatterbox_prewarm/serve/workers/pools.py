"""The models of a server: a pool of workers for each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from chatterbox_prewarm.serve.workers.voice_process import make_voice
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chatterbox_prewarm.errors import PrewarmError
    from chatterbox_prewarm.serve.workers.audio_buffer import Backlog
    from chatterbox_prewarm.serve.workers.pool import Pool
    from chatterbox_prewarm.serve.workers.supervisor import Supervisor


def slowest(pools: Iterable[Pool]) -> Pool:
    """Return the pool whose start has progressed least. Its phases are shown as the phases of the start."""
    return min(pools, key=lambda pool: (pool.ready, pool.attached))


class Pools:
    """The pools of a server, one for each model. The first one is for requests that name no model.

    Args:
        pools: at least one. All of them share one `Backlog`.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = {pool.model: pool for pool in pools}
        self._making_voice = asyncio.Lock()
        self._runs: list[asyncio.Task[None]] = []

    def __iter__(self) -> Iterator[Pool]:
        """Iterate over the pools in the order of the models."""
        return iter(self._pools.values())

    def __contains__(self, model: str) -> bool:
        return model in self._pools

    def __getitem__(self, model: str) -> Pool:
        """Return the pool of a model; "" means the first one."""
        return self._pools[model] if model else self.first

    @property
    def first(self) -> Pool:
        """The pool of the first model, which speaks texts."""
        return next(iter(self))

    @property
    def backlog(self) -> Backlog:
        """The amount of audio that waits for clients."""
        return self.first.backlog

    @property
    def attached(self) -> bool:
        """True if all models and their warm states are loaded."""
        return all(pool.attached for pool in self)

    @property
    def ready(self) -> bool:
        """True if all models were ready once, and one of those that speak texts is ready now.

        While a dead worker is replaced, the server stays ready for the other models.
        """
        return all(pool.was_ready for pool in self) and any(pool.ready for pool in self._speaking)

    @property
    def _speaking(self) -> list[Pool]:
        """The pools of the models that speak texts."""
        return [pool for pool in self if not pool.converts]

    @property
    def workers(self) -> list[tuple[str, Supervisor]]:
        """All workers, each with the name of its model."""
        return [(pool.model, worker) for pool in self for worker in pool.workers]

    @property
    def failure(self) -> PrewarmError | None:
        """Why a model failed permanently; None while no model has."""
        return next((pool.failure for pool in self if pool.failure is not None), None)

    async def run(self) -> None:
        """Keep all workers alive until `stop`. Returns early, with `failure` set, when a model has failed.

        The workers of the other models stay alive for the requests that they have.
        """
        self._runs = [asyncio.create_task(pool.run()) for pool in self]
        await asyncio.wait(self._runs, return_when=asyncio.FIRST_COMPLETED)
        if self.failure is None:
            await asyncio.gather(*self._runs)

    def close(self) -> None:
        """Stop replacing workers that end."""
        for pool in self:
            pool.close()

    async def stop(self) -> None:
        """End all workers."""
        await asyncio.gather(*(pool.stop() for pool in self))
        await asyncio.gather(*self._runs)

    async def prepare_voice(self, clip: bytes) -> bytes:
        """Compute a voice from a reference clip, for all models that speak texts, in a process of its own.

        Only one voice is computed at a time.

        Args:
            clip: a WAV file.

        Returns:
            the voice as a safetensors file.

        Raises:
            WorkerGoneError: a model is not ready.
            PrewarmError: as `voice_process.make_voice`.
        """
        if not all(pool.ready for pool in self._speaking):
            raise WorkerGoneError("no worker is ready", next_step="try again when the server is ready")
        async with self._making_voice:
            return await make_voice([pool.leading.config for pool in self._speaking], clip)
