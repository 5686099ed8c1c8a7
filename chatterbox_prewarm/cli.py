"""The command line: options in, one call, a report out. Everything it does is done elsewhere."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm import __version__
from chatterbox_prewarm.child import DEBUG
from chatterbox_prewarm.errors import BadInputError, as_prewarm_error
from chatterbox_prewarm.load import POLICIES
from chatterbox_prewarm.models import VARIANTS, get_variant
from chatterbox_prewarm.places import CACHE, WARM, WEIGHTS
from chatterbox_prewarm.profiles import PROFILES, T3_DTYPES, default_execution
from chatterbox_prewarm.text import MAX_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.prove import Evidence

_PATH = click.Path(path_type=Path)


def _option(name: str, *more: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that the environment can set as CHATTERBOX_PREWARM_NAME, shown in the help."""
    variable = "CHATTERBOX_PREWARM_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *more, envvar=variable, show_envvar=True, show_default=True, **settings)


_warm = _option("--warm", type=_PATH, default=WARM, help="The warm state's directory.")
_weights = _option("--weights", type=_PATH, default=WEIGHTS, help="The checkpoint's directory.")
_cache = _option("--cache", type=_PATH, default=CACHE, help="A writable directory for compilers and Numba.")
_device = _option("--device", default="cpu", help="The torch device, such as cpu or cuda.")


def _profile(default: str) -> Callable[[Any], Any]:
    text = f"How the model executes: as written, through torch.compile, or ahead of time; {default} by default."
    return _option("--profile", type=click.Choice(PROFILES), help=text)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="chatterbox-prewarm")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(*, debug: bool) -> None:
    """Bake warm caches for Chatterbox TTS, prove that they are used, and serve from them.

    Exit codes: 0 ok, 2 usage, 10 weights, 11 fingerprint mismatch, 12 integrity, 13 not warm, 14 engine or registry,
    15 model, 16 bad input, 70 bug.
    """
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    if debug:
        os.environ[DEBUG] = "1"
    for noisy in ("httpx", "urllib3", "docker", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@cli.group()
def weights() -> None:
    """Fetch, make and verify checkpoints."""


@weights.command("fetch")
@click.argument("directory", type=_PATH)
@_option("--variant", default="english", type=click.Choice(sorted(VARIANTS)), help="The model variant.")
@_option("--revision", help="A full commit hash; the pinned one of the variant by default.")
def weights_fetch(directory: Path, variant: str, revision: str | None) -> None:
    """Download a checkpoint from the model hub at a pinned commit into DIRECTORY, verify and record it."""
    from chatterbox_prewarm.weights import fetch

    record = fetch(directory, variant=get_variant(variant), revision=revision or None)
    click.echo(f"{directory}: {len(record.files)} files of {record.repository} at {record.revision}")


@weights.command("synthesize")
@click.argument("directory", type=_PATH)
@click.option("--size", default="full", show_default=True, help="full (3.2 GB, the published sizes) or mini.")
@click.option("--seed", default=0, show_default=True, help="Of the random generator.")
def weights_synthesize(directory: Path, size: str, seed: int) -> None:
    """Make a checkpoint of random weights in DIRECTORY. What it speaks is noise."""
    from chatterbox_prewarm.child import quiet_packages
    from chatterbox_prewarm.models.synthetic import synthesize

    quiet_packages()
    record = synthesize(directory, size=size, seed=seed)
    total = sum(file.size for file in record.files)
    click.echo(f"{directory}: {total / 1e9:.2f} GB of random weights; the speech of this model is noise")


@weights.command("record")
@click.argument("directory", type=_PATH)
@click.option("--variant", default="english", show_default=True, type=click.Choice(sorted(VARIANTS)))
def weights_record(directory: Path, variant: str) -> None:
    """Record the digests of a checkpoint of your own in DIRECTORY."""
    from chatterbox_prewarm.weights import record

    made = record(directory, variant=get_variant(variant), repository="own", revision="unversioned")
    click.echo(f"{directory}: recorded {len(made.files)} files, set digest {made.set_digest}")


@weights.command("verify")
@click.argument("directory", type=_PATH)
def weights_verify(directory: Path) -> None:
    """Compare every file in DIRECTORY with its recorded digest."""
    from chatterbox_prewarm.weights import verify

    record = verify(directory)
    click.echo(f"{directory}: {len(record.files)} files as recorded, set digest {record.set_digest}")


@cli.command()
@_weights
@_warm
@_cache
@_device
@_profile("aot")
@_option("--t3-dtype", default="float32", type=click.Choice(T3_DTYPES), help="What T3's transformer computes in.")
@click.option("--graphs/--no-graphs", default=None, help="T3's step as a CUDA graph; on a GPU it is by default.")
@_option("--levels", default="1,2,3", help="Which warm-up levels to run, separated by commas.")
@click.option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Bake a voice from a clip; repeatable.")
@click.option("--without", multiple=True, metavar="FAMILY", help="Leave a cache family out; repeatable.")
def bake(
    *,
    weights: Path,
    warm: Path,
    cache: Path,
    device: str,
    profile: str | None,
    t3_dtype: str,
    graphs: bool | None,
    levels: str,
    voices: tuple[str, ...],
    without: tuple[str, ...],
) -> None:
    """Warm the model up on this machine and write the warm state."""
    from chatterbox_prewarm import bake as baking
    from chatterbox_prewarm.families import FAMILIES

    if unknown := sorted(set(without) - set(FAMILIES)):
        raise BadInputError(f"there is no cache family {unknown[0]!r}", next_step=f"choose from: {', '.join(FAMILIES)}")
    manifest = baking.bake(
        weights,
        warm,
        cache=cache,
        device=device,
        execution=default_execution(device, profile=profile, t3_dtype=t3_dtype, graphs=graphs),
        levels=_parse_levels(levels),
        voices=dict(_parse_voice(voice) for voice in voices),
        families=[name for name in FAMILIES if name not in without],
        progress=lambda line: click.echo(f"bake: {line}", err=True),
    )
    click.echo(_family_table(manifest))


@cli.command()
@_warm
@click.option("--output", type=_PATH, required=True, help="Where the layer goes, a .tar.gz file.")
def pack(*, warm: Path, output: Path) -> None:
    """Pack the warm state as a deterministic image layer: the same state gives the same bytes."""
    from chatterbox_prewarm.image.layer import pack as pack_layer

    layer = pack_layer(warm, output)
    click.echo(f"{output}: {layer.size / 1e6:.1f} MB, digest sha256:{layer.digest}, diff id sha256:{layer.diff_id}")


@cli.command()
@_warm
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself.")
def inspect(*, warm: Path, as_json: bool) -> None:
    """Show what a warm state holds and what it was made for."""
    from chatterbox_prewarm import manifest as manifests

    manifest = manifests.read(warm)
    if as_json:
        click.echo(manifests.to_json(manifest), nl=False)
        return
    click.echo(f"warm state {manifest.set_digest}")
    click.echo(
        f"  made by {manifest.tool} on {manifest.created}, levels {', '.join(map(str, manifest.levels)) or 'none'}"
    )
    execution = manifest.execution
    graphs = "with" if execution.graphs else "without"
    click.echo(f"  {manifest.variant}, voices: {', '.join(manifest.voices)}")
    click.echo(f"  profile {execution.profile}, T3 in {execution.t3_dtype}, {graphs} CUDA graphs")
    click.echo(f"  weights {manifest.weights.repository} at {manifest.weights.revision}")
    for name in ("arch", "cpu_model", "gpu", "compute_capability", "driver", "python", "torch", "numba"):
        click.echo(f"  {name}: {manifest.fingerprint.get(name, 'not recorded')}")
    click.echo(_family_table(manifest))


@cli.command()
@_warm
@_weights
@_cache
def verify(*, warm: Path, weights: Path, cache: Path) -> None:
    """Check every digest of a warm state, and whether each family fits this machine; explains each difference."""
    from chatterbox_prewarm.fit import verify as verify_state

    for line in verify_state(warm, weights, cache):
        click.echo(line)


@cli.command()
@_warm
@_weights
@_cache
@click.option("--evidence", type=_PATH, help="Write the evidence to this JSON file, or to standard output (-).")
@click.option("--here", is_flag=True, help="This process is set apart already, as in a container: make no namespaces.")
@click.option("--image", help="Prove in a container of this image, run as it is meant to be.")
def prove(*, warm: Path, weights: Path, cache: Path, evidence: Path | None, here: bool, image: str | None) -> None:
    """Show that a fresh, isolated process hits every cache and misses none. Exit code 13 when it does not.

    With --image the places are the image's own. --cache counts with --here alone: otherwise the cache is a new folder.
    """
    from chatterbox_prewarm import prove as proving

    if evidence is not None and str(evidence) != "-":
        _check_place(evidence)
        evidence.unlink(missing_ok=True)  # an older proof must not stand for this one
    if image:
        from chatterbox_prewarm.image.engine import prove_image

        found = prove_image(image)
    elif here:
        found = proving.prove_here(warm, weights, cache)
    else:
        found = proving.prove(warm, weights)
    _write_evidence(found, evidence)
    for check in found.checks:
        click.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}", err=str(evidence) == "-")
    proving.require_passed(found)


@cli.command()
@_warm
@_weights
@_cache
@_device
@_option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Make a voice at start unless it is baked.")
@_option("--policy", default="fallback", type=click.Choice(POLICIES), help="What a start does that does not fit.")
@_profile("the one baked")
@_option("--host", default="127.0.0.1", help="The address to listen on.")
@_option("--port", default=8000, type=click.IntRange(1, 65535), help="The port to listen on.")
@_option("--threads", type=click.IntRange(1), help="CPU threads of torch; all by default.")
@_option("--max-characters", default=MAX_CHARACTERS, type=click.IntRange(1), help="The longest text accepted.")
@_option("--max-new-tokens", default=1000, type=click.IntRange(3, 1500), help="Most speech tokens, 25 a second.")
@_option(
    "--queue-limit",
    default=32,
    type=click.IntRange(1),
    help="Most requests at a time, the one being spoken too; others get 429.",
)
@_option("--drain-seconds", default=100.0, type=click.FloatRange(0), help="How long requests may finish after SIGTERM.")
def serve(
    *,
    warm: Path,
    weights: Path,
    cache: Path,
    device: str,
    voices: tuple[str, ...],
    policy: str,
    profile: str | None,
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
            device=device,
            voices={name: str(path) for name, path in map(_parse_voice, voices)},
            threads=threads,
            max_new_tokens=max_new_tokens,
        ),
    )


@cli.group()
def bench() -> None:
    """Measure; every figure is a ratio of one run."""


@bench.command("startup")
@_weights
@_warm
@_device
@click.option("--output", type=_PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each system.")
@click.option("--cold-pages", is_flag=True, help="Besides, one round with the page cache dropped (needs root).")
@click.option("--systems", default="torch,upstream,cold,warm", show_default=True, help="Which ones, in turn.")
def bench_startup(
    *, weights: Path, warm: Path, device: str, output: Path, rounds: int, cold_pages: bool, systems: str
) -> None:
    """Time starts in fresh processes, in turn: bare torch, upstream as it is, ours cold, ours warm."""
    from chatterbox_prewarm.bench.startup import run, table

    _check_place(output)
    report = run(
        weights, warm, rounds=rounds, cold_pages=cold_pages, systems=systems.split(","), device=device, say=_say
    )
    _write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@bench.command("profiles")
@_weights
@_cache
@_device
@click.option("--output", type=_PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Fresh processes of each.")
@click.option("--profiles", default=",".join(PROFILES), show_default=True, help="Which ones, in turn.")
def bench_profiles(*, weights: Path, cache: Path, device: str, output: Path, rounds: int, profiles: str) -> None:
    """Bake each profile, then time fresh processes of each in turn, beside upstream."""
    from chatterbox_prewarm.bench.profiles import run, table

    _check_place(output)
    report = run(weights, cache=cache, device=device, profiles=profiles.split(","), rounds=rounds, say=_say)
    _write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    click.echo(table(report))


@bench.command("image")
@click.option("--output", type=_PATH, required=True, help="Where the report goes, a JSON file.")
@click.option("--size", default="full", show_default=True, type=click.Choice(["full", "mini"]), help="Of the weights.")
@click.option("--checkout", type=_PATH, default=Path(), help="Of this project; the current directory by default.")
def bench_image(*, output: Path, size: str, checkout: Path) -> None:
    """Build and prove an image with random weights, then again after a change of one Python file."""
    from chatterbox_prewarm.bench.image import run

    _check_place(output)
    report = run(checkout, size=size, say=_say)
    _write_result(output, json.dumps(report, indent=1, sort_keys=True) + "\n")
    again = report["after a change"]
    click.echo(f"after a change of {report['changed']}: {again['build_seconds']} s, {len(again['steps'])} steps ran:")
    for step in again["steps"]:
        click.echo(f"  {step}")


def _check_place(path: Path) -> None:
    """Make sure that a result can be written, before the minutes that it takes to get it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise BadInputError(f"{path} is a directory", next_step="name a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _write_result(path: Path, text: str) -> None:
    """Write a result all at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _parse_levels(levels: str) -> tuple[int, ...]:
    try:
        return tuple(int(level) for level in levels.split(","))
    except ValueError:
        raise BadInputError(f"{levels!r} is no list of warm-up levels", next_step="use --levels 1,2,3") from None


def _parse_voice(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise BadInputError(f"--voice {text!r} has no path", next_step="write --voice NAME=PATH")
    return name, Path(path)


def _family_table(manifest: Any) -> str:
    lines = [f"  {'family':<14}{'files':>6}{'bytes':>14}{'spent s':>10}{'saved s':>10}"]
    for family in manifest.families:
        # What a node that pulls 100 MB/s waits for the family's bytes.
        remark = "  saves less than it costs" if family.seconds_saved < family.size / 100e6 else ""
        lines.append(
            f"  {family.name:<14}{len(family.files):>6}{family.size:>14,}{family.seconds_spent:>10.2f}"
            f"{family.seconds_saved:>10.2f}{remark}"
        )
    return "\n".join(lines)


def _write_evidence(found: Evidence, path: Path | None) -> None:
    if str(path) == "-":
        click.echo(found.to_json(), nl=False)
    elif path is not None:
        _write_result(path, found.to_json())


def main() -> None:
    """Run the command line; every error ends with its message and its exit code, and a traceback only on request."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has gone, as with `| head`
    except Exception as error:  # noqa: BLE001 - the last line of defence
        if "--debug" in sys.argv:
            traceback.print_exc()
        found = as_prewarm_error(error)
        click.echo(f"error: {found}", err=True)
        sys.exit(found.exit_code)
