"""The models of a server: its readiness, its failure, and the memory that they need together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.serve.workers import memory
from chatterbox_prewarm.serve.workers.memory import check_memory
from chatterbox_prewarm.serve.workers.pool import Pool
from chatterbox_prewarm.serve.workers.pools import Pools
from chatterbox_prewarm.serve.workers.speech_options import SpeechOptions
from chatterbox_prewarm.serve.workers.worker_client import WorkerGoneError
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig, for_devices
from chatterbox_prewarm.weights.variants import CONVERSION_MODEL, get_variant
from tests.helpers.stand_in_worker import CONFIG, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

#: Used tensors of 1 MB for T3 and for S3Gen.
_TENSORS = {"t3": ("tfmr.norm.weight",), "s3gen": ("flow.a", "mel2wav.b")}


@contextlib.asynccontextmanager
async def running(
    english: str, other: str, name: str = "multilingual"
) -> AsyncIterator[tuple[Pools, asyncio.Task[None]]]:
    """Run two models, each with a worker that plays the given part. The restarts of both become ready."""

    def config(model: str) -> WorkerConfig:
        return replace(CONFIG, model=model, start=replace(CONFIG.start, converts=model == CONVERSION_MODEL))

    pools = Pools(
        [
            Pool([(config(model), start(part)(CONFIG))], model=model, wait_seconds=20, hang_seconds=600)
            for model, part in (("english", english), (name, other))
        ]
    )
    for _, worker in pools.workers:
        worker._start, worker._pause_seconds = start("ready"), 0
    supervision = asyncio.create_task(pools.run())
    try:
        yield pools, supervision
    finally:
        await pools.stop()
        await supervision


async def until(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not in time")


async def say(pools: Pools, model: str) -> bytes:
    return b"".join([chunk.pcm async for chunk in pools[model].speak(SpeechOptions(text="Hi.", model=model))])


def test_a_server_is_ready_when_all_models_were_and_stays_so_while_one_can_speak() -> None:
    async def run() -> None:
        async with running("ready", "ready") as (pools, _):
            await until(lambda: pools.ready)
            assert pools[""] is pools.first is pools["english"]
            os.kill(pools["english"].leading.pid, signal.SIGKILL)
            await until(lambda: not pools["english"].ready)
            assert pools.ready
            assert not pools.attached
            assert await say(pools, "multilingual") == b"Hi."
            with pytest.raises(WorkerGoneError, match="no worker is ready"):
                await pools.prepare_voice(b"")
            await until(lambda: pools["english"].ready)
            assert await say(pools, "english") == b"Hi."

    asyncio.run(run())


def test_a_server_that_can_only_convert_is_not_ready() -> None:
    async def run() -> None:
        async with running("ready", "ready", CONVERSION_MODEL) as (pools, _):
            await until(lambda: pools.ready)
            os.kill(pools["english"].leading.pid, signal.SIGKILL)
            await until(lambda: not pools["english"].ready)
            assert pools[CONVERSION_MODEL].ready
            assert not pools.ready
            await until(lambda: pools.ready)

    asyncio.run(run())


def test_a_server_is_not_ready_before_its_slowest_model() -> None:
    async def run() -> None:
        async with running("ready", "silent") as (pools, _):
            await until(lambda: pools["english"].ready)
            assert not pools.ready

    asyncio.run(run())


def test_a_model_that_fails_ends_the_server_and_the_other_one_finishes_its_requests() -> None:
    async def run() -> None:
        async with running("slow", "weights") as (pools, supervision):
            await until(lambda: pools["english"].ready)
            speaking = asyncio.create_task(say(pools, "english"))
            await supervision
            assert isinstance(pools.failure, WeightsError)
            assert await speaking == b"Hi."

    asyncio.run(run())


@pytest.fixture
def configs(tmp_path: Path) -> list[WorkerConfig]:
    """Return the configurations of two models on two devices each. They share the file of S3Gen."""
    for model in ("english", "multilingual"):
        directory = tmp_path / model
        directory.mkdir()
        for part, names in _TENSORS.items():
            path = directory / get_variant(model).tensor_files[part]
            values = {name: np.zeros(1_000_000 // 4 // len(names), np.float32) for name in names}
            save_file({**values, "speaker_encoder.c": np.zeros(10**6, np.float32)} if part == "s3gen" else values, path)
    shared = tmp_path / "multilingual" / get_variant("multilingual").s3gen
    shared.unlink()
    shared.hardlink_to(tmp_path / "english" / get_variant("english").s3gen)
    checkpoints = {model: tmp_path / model for model in ("english", "multilingual")}
    return for_devices(["cpu", "cuda:1"], CONFIG, checkpoints)


def test_each_model_gets_a_worker_on_each_device(configs: list[WorkerConfig]) -> None:
    assert [(config.name, config.start.weights.name) for config in configs] == [
        ("worker english cpu", "english"),
        ("worker english cuda:1", "english"),
        ("worker multilingual cpu", "multilingual"),
        ("worker multilingual cuda:1", "multilingual"),
    ]
    assert all(WorkerConfig.from_json(config.to_json()) == config for config in configs)


def test_speech_is_converted_with_the_checkpoint_of_the_first_model(configs: list[WorkerConfig]) -> None:
    checkpoints = {config.model: config.start.weights for config in configs}
    converting = [
        config for config in for_devices(["cpu", "cuda:1"], CONFIG, checkpoints, convert=True) if config.start.converts
    ]
    assert [(config.name, config.model, config.pool) for config in converting] == [
        ("worker vc cpu", "english", "vc"),
        ("worker vc cuda:1", "english", "vc"),
    ]
    assert all(WorkerConfig.from_json(config.to_json()) == config for config in converting)


def test_models_that_do_not_fit_together_are_refused(
    configs: list[WorkerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    available: dict[str, Any] = {"memory": 1 << 40, "gpu": None}
    monkeypatch.setattr(memory, "usable_memory", lambda: available["memory"])
    monkeypatch.setattr(memory, "free_gpu_memory", lambda number: available["gpu"] if number == 1 else 0)
    check_memory(configs)
    worker, on_gpu = memory._WORKER_BYTES, memory._GPU_BYTES
    # On the CPU the shared file counts once; the file's tensors that a synthesis does not use do not count.
    enough = 4 * worker + 3_000_000
    available["memory"] = enough + 30_000
    check_memory(configs)
    available["memory"] = enough - 30_000
    with pytest.raises(
        BadInputError, match=r"english, multilingual need 4\.3 GB together, and this container has 4\.3"
    ):
        check_memory(configs)
    # On the GPU each model has its own tensors.
    available |= {"memory": 1 << 40, "gpu": 2 * on_gpu + 4_000_000 + 30_000}
    check_memory(configs)
    available["gpu"] -= 60_000
    with pytest.raises(BadInputError, match=r"the GPU cuda:1 has 4\.3 GB"):
        check_memory(configs)
