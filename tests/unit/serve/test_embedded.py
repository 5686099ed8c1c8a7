"""A `ChatterboxServer` that is closed before or during calls. A stand-in replaces the worker process."""

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
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.serve import embedded
from chatterbox_prewarm.serve.embedded import ClosedError
from chatterbox_prewarm.system.limits import MAX_SEED
from tests.conftest import ROOT
from tests.helpers.stand_in_worker import start

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess


@pytest.fixture
def make_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ChatterboxServer]:
    """A function that creates a server whose worker has the given behaviour."""

    def make(behaviour: str) -> ChatterboxServer:
        def spawn_all(configs: Sequence[WorkerConfig]) -> list[tuple[WorkerConfig, WorkerProcess]]:
            return [(config, start(behaviour)(config)) for config in configs]

        monkeypatch.setattr(embedded, "spawn_all", spawn_all)
        return ChatterboxServer()

    return make


def test_close_ends_the_calls_of_other_threads(make_server: Callable[[str], ChatterboxServer]) -> None:
    server = make_server("stuck")
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
        assert time.monotonic() - began < 15, "the worker has five seconds to stop"


def test_a_closed_server_refuses_every_call(make_server: Callable[[str], ChatterboxServer]) -> None:
    server = make_server("ready")
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


def test_invalid_options_are_refused_before_a_worker_sees_them(
    make_server: Callable[[str], ChatterboxServer],
) -> None:
    with make_server("stuck") as server:
        for options in ({"seed": -1}, {"seed": MAX_SEED + 1}, {"voice": "../x"}):
            with pytest.raises(BadInputError):
                server.generate("Hello.", **options)
        with pytest.raises(BadInputError, match="empty"):
            server.generate_stream(" ")
        with pytest.raises(TypeError, match="speed"):
            server.generate("Hello.", speed=2)


def test_the_fastapi_example_refuses_an_empty_text_before_it_responds(
    make_server: Callable[[str], ChatterboxServer],
) -> None:
    with make_server("ready") as server:
        example = runpy.run_path(str(ROOT / "docs" / "examples" / "fastapi_app.py"))
        app = example["app"]
        app.state.speech = server

        async def get(route: str, text: str) -> httpx.Response:
            transport = httpx.ASGITransport(app)  # it does not run the lifespan, which would create another server
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.get(route, params={"text": text})

        for route in ("/say", "/stream"):
            assert asyncio.run(get(route, "Hello.")).content.endswith(b"Hello.")
            refused = asyncio.run(get(route, ""))
            assert (refused.status_code, "empty" in refused.json()["detail"]) == (400, True)


def test_several_threads_may_close_a_server(make_server: Callable[[str], ChatterboxServer]) -> None:
    server = make_server("ready")
    threads = [threading.Thread(target=server.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not server._thread.is_alive()


def test_closing_a_stream_of_a_closed_server_raises_no_error(make_server: Callable[[str], ChatterboxServer]) -> None:
    server = make_server("ready")
    stream = server.generate_stream("Hello.")
    assert next(stream).data == b"Hello."
    server.close()
    stream.close()


def test_speech_says_how_many_parts_of_the_text_were_left_out(make_server: Callable[[str], ChatterboxServer]) -> None:
    pytest.importorskip("regex")
    pytest.importorskip("sentencex")
    spoken = "x" * 280
    with make_server("ready") as server:
        speech = server.generate(f"foreign {spoken} foreign")
        assert (speech.data, speech.skipped_parts) == (spoken.encode(), 2)
        chunks = list(server.generate_stream(f"foreign {spoken} foreign"))
        assert [chunk.skipped_parts for chunk in chunks if chunk.skipped_parts] == [1, 1]
        assert (chunks[-1].data, chunks[-1].skipped_parts) == (b"", 1)
        assert server.generate("Hello.").skipped_parts == 0
