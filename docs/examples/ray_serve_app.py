"""Serve Chatterbox as a Ray Serve deployment.

Start it with `serve run ray_serve_app:app`, on GPUs with `serve run ray_serve_app:app device=cuda`. Each replica warms
up in its constructor. `rayservice.yaml` runs it on several nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ray import serve
from starlette.responses import Response

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request


# The small limit on concurrent requests lets Ray's autoscaler see the requests that wait.
@serve.deployment(max_ongoing_requests=2, ray_actor_options={"num_cpus": 1})
class Speech:
    """A replica. Ray counts it as running when its constructor returns, when every stage of a synthesis has run."""

    def __init__(self, device: str, warm: str, weights: str, cache: str) -> None:
        from chatterbox_prewarm import ChatterboxServer

        self._server = ChatterboxServer(device, warm=Path(warm), weights=Path(weights), cache=Path(cache))

    async def __call__(self, request: Request) -> Response:
        """Return the query's `text` as a WAV file; `max_new_tokens` limits each part of it, at 25 tokens per second."""
        import asyncio

        query = request.query_params
        most = int(query.get("max_new_tokens", "1000"))
        audio = await asyncio.to_thread(self._server.generate, query["text"], max_new_tokens=most)
        return Response(audio.wav, media_type="audio/wav")

    def check_health(self) -> None:
        """Raise an error if no worker is left. Ray calls this at intervals and replaces a replica that raises."""
        self._server.check()


def app(options: dict[str, str]) -> Application:
    """Build the application; Ray passes the `args` of its configuration."""
    device = options.get("device", "cpu")
    deployment = Speech.options(ray_actor_options={"num_cpus": 1, "num_gpus": int(device != "cpu")})
    return deployment.bind(
        device, "/opt/chatterbox-prewarm/warm", "/opt/chatterbox-prewarm/weights", "/var/cache/chatterbox-prewarm"
    )
