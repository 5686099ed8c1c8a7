"""serve: the entrypoint of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import (
    cache_option,
    device_option,
    option,
    parse_voice,
    profile_option,
    trust_options,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.load import POLICIES
from chatterbox_prewarm.text import MAX_CHARACTERS

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@warm_option
@weights_option
@cache_option
@device_option
@option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Make a voice at start unless it is baked.")
@option("--policy", default="fallback", type=click.Choice(POLICIES), help="What a start does that does not fit.")
@profile_option("the one baked")
@trust_options
@option("--host", default="127.0.0.1", help="The address to listen on.")
@option("--port", default=8000, type=click.IntRange(1, 65535), help="The port to listen on.")
@option("--threads", type=click.IntRange(1), help="CPU threads of torch; all by default.")
@option("--max-characters", default=MAX_CHARACTERS, type=click.IntRange(1), help="The longest text accepted.")
@option("--max-new-tokens", default=1000, type=click.IntRange(3, 1500), help="Most speech tokens, 25 a second.")
@option(
    "--queue-limit",
    default=32,
    type=click.IntRange(1),
    help="Most requests at a time, the one being spoken too; others get 429.",
)
@option("--drain-seconds", default=100.0, type=click.FloatRange(0), help="How long requests may finish after SIGTERM.")
def serve(
    *,
    warm: Path,
    weights: Path,
    cache: Path,
    device: str,
    voices: tuple[str, ...],
    policy: str,
    profile: str | None,
    key: Path | None,
    signature: Path | None,
    expect_digest: str | None,
    host: str,
    port: int,
    threads: int | None,
    max_characters: int,
    max_new_tokens: int,
    queue_limit: int,
    drain_seconds: float,
) -> None:
    """Serve speech over HTTP from the warm state: /v1/audio/speech, /livez, /startupz, /readyz, /metrics."""
    from chatterbox_prewarm.serve.front import ServeConfig
    from chatterbox_prewarm.serve.front import serve as run_server
    from chatterbox_prewarm.serve.worker import WorkerConfig

    run_server(
        ServeConfig(
            host=host,
            port=port,
            max_characters=max_characters,
            queue_limit=queue_limit,
            drain_seconds=drain_seconds,
        ),
        WorkerConfig(
            warm=str(warm),
            weights=str(weights),
            cache=str(cache),
            policy=policy,
            profile=profile,
            key=str(key) if key else None,
            signature=str(signature) if signature else None,
            expect_digest=expect_digest,
            device=device,
            voices={name: str(path) for name, path in map(parse_voice, voices)},
            threads=threads,
            max_new_tokens=max_new_tokens,
        ),
    )
