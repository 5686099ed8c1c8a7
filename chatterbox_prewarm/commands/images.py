"""build, append, attest, publish, dockerfile: how a warm state becomes part of an image."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_place,
    insecure_option,
    option,
    parse_voice,
    say,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.build_request import BUILDERS, ROUTES
from chatterbox_prewarm.image.dockerfile import VARIANTS
from chatterbox_prewarm.image.engines.engine import ENGINES
from chatterbox_prewarm.image.matrix import FILE
from chatterbox_prewarm.model.profiles import PROFILES, T3_DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.image.build_request import Request

#: What a bake of a matrix says itself; its evidence lies beside its state.
_NOT_WITH_A_MATRIX = {"device", "profile", "t3_dtype", "levels", "voices", "evidence"}


@click.command()
@click.option("--tag", default="", help="The image's name; of each of a matrix, by default, after its target.")
@click.option("--matrix", type=PATH, help="Build an image for each bake of it that this machine can do.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
@click.option("--warm", type=PATH, default=Path("out/warm"), show_default=True, help="Where the warm state is kept.")
@option("--device", default="cpu", help="The torch device that the image is for, such as cpu or cuda.")
@click.option(
    "--route",
    default="export",
    show_default=True,
    type=click.Choice(ROUTES),
    help="Bake in a container and export; in the Dockerfile; or what needs no GPU, for an image for one.",
)
@click.option(
    "--builder",
    default="buildkit",
    show_default=True,
    type=click.Choice(BUILDERS),
    help="Of Docker's; the classic one has in its steps the GPU of the engine's default runtime.",
)
@option("--profile", default="aot", type=click.Choice(PROFILES), help="How the model executes.")
@option("--t3-dtype", default="float32", type=click.Choice(T3_DTYPES), help="What T3's transformer computes in.")
@option("--levels", default="1,2,3", help="Which warm-up levels to run, separated by commas.")
@click.option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Bake a voice from a clip; repeatable.")
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="Of the Dockerfile; repeatable.")
@click.option("--secret", "secrets", multiple=True, metavar="SPEC", help="As docker build has it; repeatable.")
@click.option("--network", default="default", show_default=True, help="Of the build, as docker build has it.")
@option("--engine", "engine_name", default="docker", type=click.Choice(ENGINES), help="What builds and runs.")
@click.option(
    "--evidence", type=PATH, help="Where that of the proof goes, passed or not; by default WARM.evidence.json."
)
@click.option("--replace", "replacing", is_flag=True, help="Take the name from an image that has it.")
@click.option(
    "--rebake", is_flag=True, help="Bake, even if the state that is kept was made by the same recipe and fits."
)
@click.option("--dry-run", is_flag=True, help="Check what the engine can do, show the plan, and do nothing.")
@click.pass_context
def build(
    context: click.Context,
    /,
    *,
    matrix: Path | None,
    engine_name: str,
    evidence: Path | None,
    dry_run: bool,
    **fields: Any,
) -> None:
    """Build an image on a container engine, bake in it, prove it, and tag it when it has missed nothing.

    The warm state is kept, and baked again only when something changed that it depends on.
    """
    from chatterbox_prewarm.image import build as building
    from chatterbox_prewarm.image.build_request import Request, check, plan, routes
    from chatterbox_prewarm.image.engines.connect import connect
    from chatterbox_prewarm.proof.checks import default_evidence

    request = Request(
        **{
            **fields,
            "voices": dict(map(parse_voice, fields["voices"])),
            "arguments": dict(map(_parse_argument, fields["arguments"])),
        }
    )
    requests = [request] if matrix is None else _of_matrix(context, matrix, request)
    if not all(one.tag for one in requests):
        raise click.UsageError("Missing option '--tag'.")
    _end_as_interrupted()
    with contextlib.closing(connect(engine_name)) as engine:
        if dry_run:
            click.echo("\n".join(routes(requests[0], engine)))
        for one in requests:  # before anything slow
            check(one, engine)
        if dry_run:
            for one in requests:
                click.echo("\n".join(plan(one, engine)))
            return
        places = [evidence or default_evidence(one.warm) for one in requests]
        for place in places:
            check_place(place)
        for one, place in zip(requests, places, strict=True):
            built = building.build(one, engine, place, say=say)
            click.echo(f"warm layer: {built.layer.size / 1e6:.1f} MB, diff id sha256:{built.layer.diff_id}")
            click.echo(f"{one.tag}: proven, {len(built.evidence.checks)} checks passed, evidence {place}")


def _of_matrix(context: click.Context, path: Path, template: Request) -> Sequence[Request]:
    """The builds of a matrix; what is left to other machines is said."""
    from chatterbox_prewarm.image import matrix as matrices
    from chatterbox_prewarm.image.matrix_builds import series
    from chatterbox_prewarm.system.fingerprint import read_fingerprint

    for given in context.command.params:
        if given.name in _NOT_WITH_A_MATRIX and context.get_parameter_source(given.name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{given.opts[0]} does not go with --matrix.")
    found = series(matrices.read(path), template, gpu=read_fingerprint("cuda").gpu)
    for line in found.left:
        say(f"left to another machine: {line}")
    return found.requests


@click.command()
@click.option("--base", required=True, metavar="IMAGE", help="The image below.")
@click.option("--to", "target", required=True, metavar="IMAGE", help="What the result is called, and where it goes.")
@click.option("--warm", "states", multiple=True, required=True, type=PATH, help="A state, or several; repeatable.")
@click.option("--weights", type=PATH, help="A checkpoint that is to go along.")
@click.option("--platform", default="", help="Of the base, as linux/amd64; that of the states by default.")
@click.option("--device", default="", help="That a start uses; that of the base, or of the states, by default.")
@click.option(
    "--entrypoint", metavar="WORDS", help="In place of the base's, quoted as for a shell; takes its command away."
)
@click.option("--cmd", "command", metavar="WORDS", help="In place of the base's command, quoted as for a shell.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="A variable of it; repeatable.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label of it; repeatable.")
@insecure_option
@click.option("--replace", "replacing", is_flag=True, help="Take the tag from an image that has it.")
def append(
    *,
    base: str,
    target: str,
    states: tuple[Path, ...],
    weights: Path | None,
    entrypoint: str | None,
    command: str | None,
    variables: tuple[str, ...],
    labels: tuple[str, ...],
    **more: Any,
) -> None:
    """Add warm states to an image, without an engine: what the target lacks is sent, and its tag comes last.

    IMAGE is HOST/NAME:TAG in a registry, oci:PATH:TAG for a layout, docker-archive:PATH:NAME:TAG for a file.
    """
    from chatterbox_prewarm.image.append import append as append_image
    from chatterbox_prewarm.image.compose import Change
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.state_layers import gather

    below, result = parse(base), parse(target)
    settings = Change(
        labels=dict(_parse_pair("--label", text) for text in labels),
        environment=dict(_parse_pair("--env", text) for text in variables),
        entrypoint=_parse_words("--entrypoint", entrypoint),
        command=_parse_words("--cmd", command),
    )
    _end_as_interrupted()
    with gather(states, weights) as addition:
        made = append_image(below, result, addition, settings=settings, say=say, **more)
    click.echo(f"{result}: {made.blobs_sent} blobs sent, {made.bytes_sent / 1e6:.1f} MB")
    click.echo(f"digest {made.document.digest}")


@click.command()
@click.option("--image", required=True, metavar="IMAGE", help="In a registry or a layout.")
@click.option("--evidence", required=True, type=PATH, help="What `prove --evidence` wrote.")
@insecure_option
def attest(*, image: str, evidence: Path, insecure: bool | None) -> None:
    """Attach the evidence of a proof to an image, as an OCI referrer; the image stays as it is."""
    from chatterbox_prewarm.image.attest import attach_evidence
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.stores import storing

    with storing(parse(image), insecure=insecure) as (store, name):
        digest = attach_evidence(store, name, evidence)
    click.echo(f"{image}: evidence attached as {digest}")


@click.command()
@click.option("--for", "variant", required=True, type=click.Choice(VARIANTS), help="The builder that it is for.")
@click.option("--checkout", type=PATH, default=Path(), help="Of this project; the current directory by default.")
@click.option("--target", default="runtime", show_default=True, help="The last stage of one for the classic builder.")
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="That choose stages; repeatable.")
def dockerfile(*, variant: str, checkout: Path, target: str, arguments: tuple[str, ...]) -> None:
    """Print the Dockerfile for another builder: with the GPU in the step that bakes (cdi), or without mounts (classic).

    cdi needs BuildKit 0.20 and Buildx 0.22: docker buildx build --allow device=nvidia.com/gpu=all --build-arg
    DEVICE=cuda -f - .
    """
    from chatterbox_prewarm.image.dockerfile import for_cdi, for_classic

    path = checkout / "Dockerfile"
    if not path.is_file():
        raise BadInputError(f"{checkout} has no Dockerfile", next_step="name a checkout of this project")
    text = path.read_text(encoding="utf-8")
    found = for_cdi(text) if variant == "cdi" else for_classic(text, dict(map(_parse_argument, arguments)), target)
    click.echo(found, nl=False)


@click.command()
@click.option("--matrix", type=PATH, default=Path(FILE), show_default=True, help="Which bakes there are.")
@click.option("--index", type=click.IntRange(0), envvar="JOB_COMPLETION_INDEX", show_envvar=True, help="Which of them.")
@click.option("--list", "listing", is_flag=True, help="List the bakes with their numbers, and do nothing.")
@option("--warm", type=PATH, default="/tmp/warm", help="Where the state is made.")  # noqa: S108 - in a container
@weights_option
@cache_option
@insecure_option
def publish(
    *, matrix: Path, index: int | None, listing: bool, warm: Path, weights: Path, cache: Path, insecure: bool | None
) -> None:
    """Bake on this node without an engine, prove it, and add it to an image in a registry: a container of a Job.

    Runs in an image of the stage `tools`; the matrix names the image of the stage `cold` as its base.
    """
    from chatterbox_prewarm.image import matrix as matrices

    found = matrices.read(matrix)
    if listing:
        for number, bake in enumerate(found.bakes):
            voices = ", ".join(bake.voices) or "no more voices"
            click.echo(f"{number}: {bake.title}, {voices}")
        return
    if index is None or index >= len(found.bakes):
        raise BadInputError(
            f"{matrix} has {len(found.bakes)} bakes, and --index is {index}", next_step="see publish --list"
        )
    from chatterbox_prewarm.image import publish as publishing
    from chatterbox_prewarm.proof.checks import default_evidence

    _end_as_interrupted()
    places = publishing.Places(weights=weights, warm=warm, cache=cache, evidence=default_evidence(warm))
    made = publishing.publish(found.bakes[index], found.base, found.target, places, insecure=insecure, say=say)
    if made is not None:
        click.echo(f"{found.target}: {made.blobs_sent} blobs sent, {made.bytes_sent / 1e6:.1f} MB")
        click.echo(f"digest {made.document.digest}")


def _end_as_interrupted() -> None:
    """SIGTERM ends a command as Ctrl-C does: what is in the making goes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _parse_argument(text: str) -> tuple[str, str]:
    return _parse_pair("--build-arg", text)


def _parse_pair(option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise BadInputError(f"{option} {text!r} has no value", next_step=f"write {option} NAME=VALUE")
    return name, value


def _parse_words(option: str, text: str | None) -> list[str] | None:
    """The words of a command, as a shell tells them apart; none of an empty text."""
    try:
        return None if text is None else shlex.split(text)
    except ValueError as error:
        raise BadInputError(f"{option} {text!r} is no command: {error}", next_step="close its quotes") from error
