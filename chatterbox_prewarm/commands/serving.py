"""serve: the entrypoint of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    option,
    parse_alias,
    parse_voice,
    profile_option,
    trust_options,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.serve.workers import log_lines
from chatterbox_prewarm.start.prepared import POLICIES
from chatterbox_prewarm.system.paths import VOICES

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@warm_option
@weights_option
@cache_option
@option(
    "--device",
    default="cpu",
    help="Torch devices with commas between them, a worker for each; cuda:all is every GPU there is.",
)
@option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Make a voice at start unless it is baked.")
@option("--voices-dir", type=PATH, default=VOICES, help="Where added voices are kept; without it, none can be added.")
@option("--max-voices", default=1000, type=click.IntRange(0), help="Most voices that may be added.")
@option(
    "--voice-alias",
    "voice_aliases",
    multiple=True,
    metavar="NAME=VOICE",
    help="Another name of a voice, for clients with names of their own; *=VOICE is for every name that no voice has.",
)
@option("--policy", default="fallback", type=click.Choice(POLICIES), help="What a start does that does not fit.")
@profile_option("the one baked")
@trust_options
@option("--host", default="127.0.0.1", help="The address to listen on.")
@option("--port", default=8000, type=click.IntRange(1, 65535), help="The port to listen on.")
@option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of torch, of each worker; by default those on the CPU divide its cores.",
)
@option("--max-characters", default=MAX_CHARACTERS, type=click.IntRange(1), help="The longest text accepted.")
@option(
    "--max-new-tokens",
    default=1000,
    type=click.IntRange(3, 1500),
    help="Most speech tokens of each part of a text, 25 a second.",
)
@option(
    "--queue-limit",
    default=32,
    type=click.IntRange(1),
    help="Most requests at a time, the one being spoken too; others get 429.",
)
@option(
    "--queue-seconds",
    default=120.0,
    type=click.FloatRange(0.1),
    help="How long a part of a text may wait for a worker; then its request gets 503.",
)
@option(
    "--hang-seconds",
    default=120.0,
    type=click.FloatRange(5),
    help="A worker from which nothing is heard for so long is replaced, be it at work, idle or in its start.",
)
@option(
    "--requests-per-minute",
    default=0.0,
    type=click.FloatRange(0),
    help="The load to expect: what it makes worth warming up beyond what a start does is done while idle.",
)
@option(
    "--token-file",
    type=PATH,
    help="Demand the token in this file of everybody but probes; CHATTERBOX_PREWARM_TOKEN may hold it instead.",
)
@option(
    "--max-connections",
    default=1000,
    type=click.IntRange(8),
    help="Most open connections; for more, the longest idle one is closed.",
)
@option("--log-format", default="text", type=click.Choice(log_lines.FORMATS), help="How log lines look.")
@option("--log-text", is_flag=True, help="Log what is spoken, too.")
@option("--drain-seconds", default=100.0, type=click.FloatRange(0), help="How long requests may finish after SIGTERM.")
def serve(
    *,
    warm: Path,
    weights: Path,
    cache: Path,
    device: str,
    voices: tuple[str, ...],
    voices_dir: Path,
    max_voices: int,
    voice_aliases: tuple[str, ...],
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
    queue_seconds: float,
    hang_seconds: float,
    requests_per_minute: float,
    token_file: Path | None,
    max_connections: int,
    log_format: str,
    log_text: bool,
    drain_seconds: float,
) -> None:
    """Serve speech over HTTP from the warm state: /v1/audio/speech, /livez, /startupz, /readyz, /metrics, a page."""
    from chatterbox_prewarm.serve.http.access import load_token
    from chatterbox_prewarm.serve.http.connections import Limits
    from chatterbox_prewarm.serve.http.server import ServeConfig
    from chatterbox_prewarm.serve.http.server import serve as run_server
    from chatterbox_prewarm.serve.workers.devices import for_devices, parse_devices
    from chatterbox_prewarm.serve.workers.worker import WorkerConfig

    log_lines.install(log_format, process="front")
    run_server(
        ServeConfig(
            host=host,
            port=port,
            max_characters=max_characters,
            weights=weights,
            voices_dir=voices_dir,
            max_voices=max_voices,
            voice_aliases=dict(map(parse_alias, voice_aliases)),
            queue_limit=queue_limit,
            queue_seconds=queue_seconds,
            hang_seconds=hang_seconds,
            drain_seconds=drain_seconds,
            token=load_token(token_file),
            limits=Limits(connections=max_connections),
            log_text=log_text,
        ),
        for_devices(
            parse_devices(device),
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
                voice_directory=str(voices_dir),
                threads=threads,
                max_new_tokens=max_new_tokens,
                requests_per_minute=requests_per_minute,
                log_format=log_format,
            ),
        ),
    )
