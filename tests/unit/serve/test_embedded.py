"""What becomes of calls when a `ChatterboxServer` is closed, with a stand-in for the worker's process."""

from __future__ import annotations

import asyncio
import runpy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from chatterbox_prewarm import ChatterboxServer
from chatterbox_prewarm.serve import embedded
from chatterbox_prewarm.serve.embedded import ClosedError
from tests.conftest import ROOT
from tests.helpers.stand_in_worker import start

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from chatterbox_prewarm.serve.workers.spawn import Spawned
    from chatterbox_prewarm.serve.workers.worker import WorkerConfig


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ChatterboxServer]:
    """Constructs a server whose worker plays a part."""

    def construct(part: str) -> ChatterboxServer:
        def spawn_all(configs: Sequence[WorkerConfig]) -> list[tuple[WorkerConfig, Spawned]]:
            return [(config, start(part)(config)) for config in configs]

        monkeypatch.setattr(embedded, "spawn_all", spawn_all)
        return ChatterboxServer()

    return construct


def test_closing_ends_the_calls_of_other_threads(make: Callable[[str], ChatterboxServer]) -> None:
    server = make("stuck")
    with ThreadPoolExecutor(4) as threads:
        calls: list[Future[Any]] = [threads.submit(server.generate, "Hello.", seed=1) for _ in range(3)]
        calls.append(threads.submit(lambda: list(server.generate_stream("Hello."))))
        deadline = time.monotonic() + 20
        while server._pool.waiting < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        server.close()
        for call in calls:
            assert isinstance(call.exception(5), ClosedError)
        assert time.monotonic() - began < 15, "the worker is given five seconds"


def test_what_is_asked_of_a_closed_server_is_refused(make: Callable[[str], ChatterboxServer]) -> None:
    server = make("ready")
    assert server.generate("Hello.").data == b"Hello."
    stream = server.generate_stream("Hello.")
    assert next(stream).data == b"Hello."
    server.close()
    server.close()
    with pytest.raises(ClosedError, match="the server is closed"):
        server.generate("Hello.")
    with pytest.raises(ClosedError):
        next(server.generate_stream("Hello."))
    with pytest.raises(ClosedError):
        next(stream)
    with pytest.raises(ClosedError):
        server.check()
    assert server.voices == ["default"]


def test_the_example_for_fastapi_refuses_a_text_before_it_answers(make: Callable[[str], ChatterboxServer]) -> None:
    server = make("ready")
    try:
        example = runpy.run_path(str(ROOT / "docs" / "examples" / "fastapi_app.py"))
        app = example["app"]
        app.state.speech = server

        async def get(route: str, text: str) -> httpx.Response:
            transport = httpx.ASGITransport(app)  # without the lifespan, which would make a server of its own
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.get(route, params={"text": text})

        for route in ("/say", "/stream"):
            assert asyncio.run(get(route, "Hello.")).content.endswith(b"Hello.")
            refused = asyncio.run(get(route, ""))
            assert (refused.status_code, "empty" in refused.json()["detail"]) == (400, True)
    finally:
        server.close()


def test_two_threads_may_close_it(make: Callable[[str], ChatterboxServer]) -> None:
    server = make("ready")
    threads = [threading.Thread(target=server.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not server._thread.is_alive()


def test_a_stream_that_is_left_after_the_close_says_nothing(make: Callable[[str], ChatterboxServer]) -> None:
    server = make("ready")
    stream = server.generate_stream("Hello.")
    next(stream)
    server.close()
    stream.close()
