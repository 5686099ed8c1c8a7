"""Chatterbox as a Ray Serve deployment: `serve run ray_serve_app:app`. Each replica warms up as it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ray import serve
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.requests import Request


# For GPUs: ray_actor_options={"num_gpus": 1}, and device="cuda" below. Few calls at a time, so that Ray's own
# autoscaling sees who waits.
@serve.deployment(max_ongoing_requests=2, ray_actor_options={"num_cpus": 1})
class Speech:
    """A replica; Ray counts it as running when its constructor returns, which is when a real synthesis has passed."""

    def __init__(self, warm: str, weights: str, cache: str) -> None:
        from chatterbox_prewarm import ChatterboxServer

        self._server = ChatterboxServer(warm=Path(warm), weights=Path(weights), cache=Path(cache), device="cpu")

    async def __call__(self, request: Request) -> Response:
        """A WAV file of the query's `text`; `max_new_tokens` bounds each part of it, 25 to a second."""
        import asyncio

        query = request.query_params
        most = int(query.get("max_new_tokens", "1000"))
        audio = await asyncio.to_thread(self._server.generate, query["text"], max_new_tokens=most)
        return Response(audio.wav, media_type="audio/wav")

    def check_health(self) -> None:
        """Ray calls it now and then, and replaces a replica of which it raises."""
        self._server.check()


app = Speech.bind("/opt/chatterbox-prewarm/warm", "/opt/chatterbox-prewarm/weights", "/var/cache/chatterbox-prewarm")
