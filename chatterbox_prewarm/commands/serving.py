"""serve: the command that an image runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    Form,
    cache_option,
    option,
    parse_alias,
    parse_voice,
    profile_option,
    trust_options,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.model.marks import MARKED
from chatterbox_prewarm.model.text import MAX_CHARACTERS
from chatterbox_prewarm.serve.http.cross_origin import Sites, parse_host, parse_origin
from chatterbox_prewarm.serve.workers import log_lines
from chatterbox_prewarm.start.options import POLICIES, StartOptions
from chatterbox_prewarm.system.devices import check_device_names
from chatterbox_prewarm.system.paths import VOICES
from chatterbox_prewarm.weights.variants import check_any_language, get_variant

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess
    from chatterbox_prewarm.state.signature import Trust


def _once(_context: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Check that no name is given twice; a callback of click."""
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"{name} is named twice")
    return names


@click.command(short_help="Serve speech over HTTP.")
@warm_option
@weights_option
@cache_option
@option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME",
    type=Form("model", get_variant),
    callback=_once,
    help="Model to serve, if --weights has several checkpoints; the first one is the default. Default: all.",
)
@option(
    "--convert",
    is_flag=True,
    help="Also convert speech to the voices of the first model. Each device gets one more worker.",
)
@option(
    "--device",
    default="cpu",
    type=Form("devices", check_device_names),
    help="Torch devices, separated by commas, with a worker for each. cuda:all is every GPU.",
)
@option(
    "--voice",
    "voices",
    multiple=True,
    metavar="NAME=PATH",
    help="Make a voice at start unless it is baked.",
)
@option(
    "--voices-dir",
    type=PATH,
    default=VOICES,
    help="Directory of added voices. Without it, none can be added.",
)
@option("--max-voices", default=1000, type=click.IntRange(0), help="Maximum number of added voices.")
@option(
    "--voice-alias",
    "voice_aliases",
    multiple=True,
    metavar="NAME=VOICE",
    help="Additional name of a voice, for clients with fixed names: any text. *=VOICE is for all unknown names.",
)
@option("--policy", default="fallback", type=click.Choice(POLICIES), help="What to do if the warm state does not fit.")
@profile_option("as baked")
@trust_options
@option(
    "--host", default="127.0.0.1", help="Address to listen on. 0.0.0.0 is all of IPv4, and :: is all of IPv6 and IPv4."
)
@option("--port", default=8000, type=click.IntRange(1, 65535), help="Port to listen on.")
@option(
    "--threads",
    type=click.IntRange(1),
    help="CPU threads of torch per worker. Default: the workers share the CPUs that the container may use.",
)
@option("--max-characters", default=MAX_CHARACTERS, type=click.IntRange(1), help="Maximum length of a text.")
@option(
    "--language",
    metavar="CODE",
    type=Form("language", check_any_language),
    help="Language of requests that name none. Default: the model's first one.",
)
@option(
    "--plain-text",
    multiple=True,
    type=click.Choice(MARKED, case_sensitive=False),
    help="Language whose texts may lack marks that the model needs: he (points) or ru (stress).",
)
@option("--ignore-speed", is_flag=True, help="Speak requests with any speed, at the model's speed.")
@option(
    "--max-new-tokens",
    default=1000,
    type=click.IntRange(3, 1500),
    help="Maximum number of speech tokens for each part of a text, 25 per second.",
)
@option(
    "--queue-limit",
    default=32,
    type=click.IntRange(1),
    help="Maximum number of requests, queued and running. Further requests get 429.",
)
@option(
    "--queue-seconds",
    default=120.0,
    type=click.FloatRange(0.1),
    help="Seconds that a request may wait for a worker before it gets 503.",
)
@option(
    "--hang-seconds",
    default=120.0,
    type=click.FloatRange(5),
    help="Replace a worker that has been silent for this many seconds: busy, idle or starting.",
)
@option(
    "--requests-per-minute",
    default=0.0,
    type=click.FloatRange(0),
    help="Expected load. From 1 request per minute on, extra warm-up runs while the server is idle.",
)
@option(
    "--token-file",
    type=PATH,
    help="File with a token that all requests except probes need. Safer than CHATTERBOX_PREWARM_TOKEN.",
)
@option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    type=Form("origin", parse_origin),
    help="Site whose pages may use the server from a browser, such as https://chat.example. *: every site.",
)
@option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="HOST",
    type=Form("host", parse_host),
    help="Name in the addresses of this server, such as tts.example. Requests to other names are refused.",
)
@option(
    "--max-connections",
    default=1000,
    type=click.IntRange(8),
    help="Maximum number of connections. Beyond it, the one idle for longest is closed.",
)
@option("--log-format", default="text", type=click.Choice(log_lines.FORMATS), help="Format of log lines.")
@option("--log-text", is_flag=True, help="Also log the spoken texts and complete paths.")
@option(
    "--drain-seconds",
    default=100.0,
    type=click.FloatRange(0),
    help="Seconds to finish requests after SIGTERM.",
)
@click.pass_obj
def serve(
    waiting: WorkerProcess | None,
    *,
    warm: Path,
    weights: Path,
    cache: Path,
    variants: tuple[str, ...],
    convert: bool,
    device: str,
    voices: tuple[str, ...],
    voices_dir: Path,
    max_voices: int,
    voice_aliases: tuple[str, ...],
    policy: str,
    profile: str | None,
    trust: Trust,
    host: str,
    port: int,
    threads: int | None,
    max_characters: int,
    language: str | None,
    plain_text: tuple[str, ...],
    ignore_speed: bool,
    max_new_tokens: int,
    queue_limit: int,
    queue_seconds: float,
    hang_seconds: float,
    requests_per_minute: float,
    token_file: Path | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    max_connections: int,
    log_format: str,
    log_text: bool,
    drain_seconds: float,
) -> None:
    """Serve speech over HTTP: /v1/audio/speech, /livez, /startupz, /readyz, /metrics, and a page at /."""
    from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig, for_devices, parse_devices, running
    from chatterbox_prewarm.state.places import check_cache_place, check_output_place
    from chatterbox_prewarm.state.signature import check_trust_for_models
    from chatterbox_prewarm.weights.checkpoints import choose_checkpoints

    log_lines.install(log_format, process="front", level=min(logging.root.level, logging.INFO))
    worker = WorkerConfig(
        start=StartOptions(
            warm=warm,
            weights=weights,
            cache=cache,
            policy=policy,
            profile=profile,
            trust=trust,
            plain_text=MARKED,  # the front checks complete texts
        ),
        voices=dict(map(parse_voice, voices)),
        voice_directory=voices_dir,
        threads=threads,
        max_new_tokens=max_new_tokens,
        requests_per_minute=requests_per_minute,
        log_format=log_format,
    )
    checkpoints = choose_checkpoints(weights, variants)
    check_trust_for_models(trust, checkpoints)
    configs = for_devices(parse_devices(device), worker, checkpoints, convert=convert)
    check_output_place(voices_dir)
    check_cache_place(cache, warm=warm, weights=weights)  # a worker checks it too
    if len(checkpoints) > 1 or convert:
        from chatterbox_prewarm.serve.workers.memory import check_memory

        check_memory(configs)
    with running(configs, waiting) as workers:
        # Imported here, because the workers should not wait for it.
        from chatterbox_prewarm.serve.http.access import load_token
        from chatterbox_prewarm.serve.http.connections import Limits
        from chatterbox_prewarm.serve.http.server import ServeConfig
        from chatterbox_prewarm.serve.http.server import serve as run_server
        from chatterbox_prewarm.serve.http.speech_rules import SpeechRules

        config = ServeConfig(
            host=host,
            port=port,
            rules=SpeechRules(
                max_characters=max_characters,
                ignore_speed=ignore_speed,
                language=language,
                plain_text=plain_text,
                converts=convert,
            ),
            checkpoints=checkpoints,
            voices_dir=voices_dir,
            max_voices=max_voices,
            voice_aliases=dict(map(parse_alias, voice_aliases)),
            queue_limit=queue_limit,
            queue_seconds=queue_seconds,
            hang_seconds=hang_seconds,
            drain_seconds=drain_seconds,
            token=load_token(token_file),
            sites=Sites(hosts=tuple(map(parse_host, hosts)), origins=tuple(map(parse_origin, origins))),
            limits=Limits(connections=max_connections),
            log_text=log_text,
        )
        run_server(config, workers)
