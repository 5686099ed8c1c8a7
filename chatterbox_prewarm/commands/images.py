"""build, append, attest, publish, dockerfile: the commands that put a warm state into an image."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_output,
    insecure_option,
    option,
    parse_voice,
    refuse_options,
    say,
    targets_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.build_request import BUILDERS, ROUTES
from chatterbox_prewarm.image.dockerfile import VARIANTS
from chatterbox_prewarm.image.engines.engine import ENGINES
from chatterbox_prewarm.image.matrix import MATRIX_NAME
from chatterbox_prewarm.model.profiles import PROFILES, T3_DTYPES
from chatterbox_prewarm.system.paths import WARM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.image.append import AppendResult
    from chatterbox_prewarm.image.build_request import BuildRequest
    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.proof.checks import Evidence

#: Where `publish` writes the new state in its container.
_NEW_STATE = Path("/tmp/warm")  # noqa: S108
#: Options without effect for GPUs that the machine lacks, and the reason.
_NOT_WITH_A_TARGET = {"levels", "evidence"}, "--target, because without the GPU nothing is warmed up or proven"
#: Options that each bake of a matrix sets itself. Its evidence is next to its state.
_NOT_WITH_A_MATRIX = {"device", "targets", "profile", "t3_dtype", "levels", "voices", "evidence"}


@click.command(short_help="Build, bake, prove and tag an image.")
@click.option("--tag", default="", help="Name of the image. With --matrix, the default is derived from its target.")
@click.option("--matrix", type=PATH, help="Build an image for each bake of this file that this machine can run.")
@click.option("--checkout", type=PATH, default=Path(), help="Checkout of this project. Default: the current directory.")
@click.option("--warm", type=PATH, default=Path("out/warm"), show_default=True, help="Directory of the warm state.")
@option("--device", default="cpu", help="Torch device that the image is for, such as cpu or cuda.")
@targets_option
@click.option(
    "--route",
    default="export",
    show_default=True,
    type=click.Choice(ROUTES),
    help="Bake in a container (export), in the Dockerfile, or only what needs no GPU (no-gpu).",
)
@click.option(
    "--builder",
    default="buildkit",
    show_default=True,
    type=click.Choice(BUILDERS),
    help="Docker's builder. The steps of the classic one get the GPU of the engine's default runtime.",
)
@option("--profile", default="aot", type=click.Choice(PROFILES), help="How the model runs.")
@option("--t3-dtype", default="float32", type=click.Choice(T3_DTYPES), help="Data type of T3's transformer.")
@option("--levels", default="1,2,3", help="Warm-up levels, separated by commas.")
@click.option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Bake a voice from a clip; repeatable.")
@click.option(
    "--build-arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Build argument of the Dockerfile; repeatable.",
)
@click.option("--secret", "secrets", multiple=True, metavar="SPEC", help="Secret, as for docker build; repeatable.")
@click.option("--network", default="default", show_default=True, help="Network of the build, as for docker build.")
@option("--engine", "engine_name", default="docker", type=click.Choice(ENGINES), help="Engine that builds and runs.")
@click.option(
    "--evidence", type=PATH, help="Path of the evidence, also of a failed proof. Default: WARM.evidence.json."
)
@click.option("--replace", "replacing", is_flag=True, help="Replace an image that has this name.")
@click.option("--rebake", is_flag=True, help="Bake even if the existing state was made with the same recipe and fits.")
@click.option("--dry-run", is_flag=True, help="Check the engine and show the plan, but do nothing.")
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
    """Build an image on a container engine, bake a warm state, prove the image, and tag it if the proof passes.

    The warm state is kept. It is baked again only if something changed on which it depends. With --target, the image
    gets its tag without a proof, which needs the GPU; several targets give an image with a state for each.
    """
    from chatterbox_prewarm.image import build as building
    from chatterbox_prewarm.image.build_request import check_request, describe_plan, describe_routes
    from chatterbox_prewarm.image.engines.connect import connect
    from chatterbox_prewarm.proof.checks import default_evidence

    requests = _requests(context, matrix, fields)
    if not all(each.tag for each in requests):
        raise click.UsageError("Missing option '--tag'.")
    _exit_on_sigterm()
    with contextlib.closing(connect(engine_name)) as engine:
        if dry_run:
            click.echo("\n".join(describe_routes(requests[0], engine)))
        for each in requests:  # before anything slow
            check_request(each, engine)
        if dry_run:
            for each in requests:
                click.echo("\n".join(describe_plan(each, engine)))
            return
        outputs = [evidence or default_evidence(each.warm) for each in requests]
        for output in outputs:
            check_output(output)
        for each, output in zip(requests, outputs, strict=True):
            _report_build(each.tag, *building.build(each, engine, output, say=say))


def _report_build(tag: str, layers: Sequence[Layer], proofs: Mapping[Path, Evidence]) -> None:
    for layer in layers:
        click.echo(f"warm layer: {layer.size / 1e6:.1f} MB, diff id sha256:{layer.diff_id}")
    if not proofs:
        click.echo(f"{tag}: unproven. On a machine with the GPU: prove --image {tag}")
    for path, proof in proofs.items():
        click.echo(f"{tag}: proven, {len(proof.checks)} checks passed, evidence {path}")


def _requests(context: click.Context, matrix: Path | None, fields: dict[str, Any]) -> Sequence[BuildRequest]:
    """Make the builds of a command line."""
    from chatterbox_prewarm.image.build_request import BuildRequest

    if fields["targets"]:
        refuse_options(context, *_NOT_WITH_A_TARGET)
    request = BuildRequest(
        **{
            **fields,
            "voices": dict(map(parse_voice, fields["voices"])),
            "arguments": dict(map(_parse_argument, fields["arguments"])),
        }
    )
    return [request] if matrix is None else _matrix_requests(context, matrix, request)


def _matrix_requests(context: click.Context, path: Path, template: BuildRequest) -> Sequence[BuildRequest]:
    """Make the builds of a matrix, and report builds that this machine cannot run."""
    from chatterbox_prewarm.image import matrix as matrices
    from chatterbox_prewarm.system.fingerprint import read_fingerprint

    refuse_options(context, _NOT_WITH_A_MATRIX, "--matrix")
    requests, skipped = matrices.select_builds(matrices.read_matrix(path), template, gpu=read_fingerprint("cuda").gpu)
    for line in skipped:
        say(f"skipped, because it needs another machine: {line}")
    return requests


@click.command(short_help="Add warm states to an image.")
@click.option("--base", required=True, metavar="IMAGE", help="Image to which the states are added.")
@click.option("--to", "target", required=True, metavar="IMAGE", help="Name and destination of the result.")
@click.option(
    "--warm", "states", multiple=True, required=True, type=PATH, help="State, or folder of states; repeatable."
)
@click.option("--weights", type=PATH, help="Checkpoint to add.")
@click.option("--platform", default="", help="Platform of the base, such as linux/amd64. Default: of the states.")
@click.option("--device", default="", help="Device of a start. Default: the device of the base, or else of the states.")
@click.option(
    "--entrypoint",
    metavar="WORDS",
    help="Replace entrypoint and command of the base. Quote as for a shell.",
)
@click.option("--cmd", "command", metavar="WORDS", help="Replace the command of the base. Quote as for a shell.")
@click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="Environment variable; repeatable.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Label of the result; repeatable.")
@insecure_option
@click.option("--replace", "replacing", is_flag=True, help="Replace an image that has this tag.")
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
    """Add warm states to an image, without a container engine. Upload only missing blobs, then set the tag.

    IMAGE is HOST/NAME:TAG in a registry, oci:PATH:TAG in an OCI layout, docker-archive:PATH:NAME:TAG in a file.
    """
    from chatterbox_prewarm.image.append import AppendOptions
    from chatterbox_prewarm.image.append import append as append_image
    from chatterbox_prewarm.image.compose import Change
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.state_layers import pack_states

    below, result = parse(base), parse(target)
    settings = Change(
        labels=dict(_parse_pair("--label", text) for text in labels),
        environment=dict(_parse_pair("--env", text) for text in variables),
        entrypoint=_parse_words("--entrypoint", entrypoint),
        command=_parse_words("--cmd", command),
    )
    _exit_on_sigterm()
    with pack_states(states, weights) as addition:
        made = append_image(below, result, addition, AppendOptions(settings=settings, say=say, **more))
    _print_result(result, made)


@click.command(short_help="Attach the evidence of a proof to an image.")
@click.option("--image", required=True, metavar="IMAGE", help="Image in a registry or an OCI layout.")
@click.option("--evidence", required=True, type=PATH, help="File that `prove --evidence` wrote.")
@insecure_option
def attest(*, image: str, evidence: Path, insecure: bool | None) -> None:
    """Attach the evidence of a proof to an image as an OCI referrer. The image does not change."""
    from chatterbox_prewarm.image.attest import attach_evidence
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.stores import open_store

    with open_store(parse(image), insecure=insecure) as (store, name):
        digest = attach_evidence(store, name, evidence)
    click.echo(f"{image}: evidence attached as {digest}")


@click.command(short_help="Print the Dockerfile for another builder.")
@click.option("--for", "variant", required=True, type=click.Choice(VARIANTS), help="Builder for the Dockerfile.")
@click.option("--checkout", type=PATH, default=Path(), help="Checkout of this project. Default: the current directory.")
@click.option("--target", default="runtime", show_default=True, help="Last stage, for the classic builder.")
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="Selects stages; repeatable.")
def dockerfile(*, variant: str, checkout: Path, target: str, arguments: tuple[str, ...]) -> None:
    """Print the Dockerfile for another builder: with a GPU in the bake step (cdi), or without mounts (classic).

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


@click.command(short_help="Bake, prove and publish on this node.")
@click.option("--matrix", type=PATH, default=Path(MATRIX_NAME), show_default=True, help="File that lists the bakes.")
@click.option("--index", type=click.IntRange(0), envvar="JOB_COMPLETION_INDEX", show_envvar=True, help="Bake to run.")
@click.option("--list", "listing", is_flag=True, help="Only list the bakes with their numbers.")
@click.option("--prove-only", "image", metavar="IMAGE", help="Only prove this image, in a container of it.")
@click.option("--state", help="With --prove-only: the state to prove. Default: those that a start would use here.")
@option("--warm", type=PATH, help=f"Directory of the new state. Default: {_NEW_STATE}; with --prove-only, {WARM}.")
@weights_option
@cache_option
@insecure_option
@click.pass_context
def publish(
    context: click.Context,
    /,
    *,
    matrix: Path,
    index: int | None,
    listing: bool,
    image: str | None,
    state: str | None,
    warm: Path | None,
    **places: Any,
) -> None:
    """Bake on this node without a container engine, prove the state, and add it to an image in a registry.

    For a Kubernetes Job. It runs in an image of the stage `tools`; the base of the matrix is an image of the stage
    `cold`. With --prove-only, it runs in an image that has a state, proves that state on this node, and attaches the
    evidence to the image in the registry.
    """
    from chatterbox_prewarm.image import matrix as matrices
    from chatterbox_prewarm.image import publish as publishing

    if image is not None:
        refuse_options(context, {"matrix", "index", "listing"}, "--prove-only")
        options = publishing.PublishOptions(warm=warm or WARM, say=say, **places)
        for digest in publishing.prove_image(image, options, name=state):
            click.echo(f"{image}: evidence attached as {digest}")
        return
    if state is not None:
        raise click.UsageError("--state needs --prove-only.")
    found = matrices.read_matrix(matrix)
    if listing:
        for number, bake in enumerate(found.bakes):
            voices = ", ".join(bake.voices) or "no added voices"
            click.echo(f"{number}: {bake.title}, {voices}")
        return
    if index is None or index >= len(found.bakes):
        raise BadInputError(
            f"{matrix} has {len(found.bakes)} bakes, but --index is {index}", next_step="see publish --list"
        )
    _exit_on_sigterm()
    options = publishing.PublishOptions(warm=warm or _NEW_STATE, say=say, **places)
    made = publishing.publish(found.bakes[index], found.base, found.target, options)
    if made is not None:
        _print_result(found.target, made)


def _print_result(image: object, made: AppendResult) -> None:
    click.echo(f"{image}: {made.blobs_sent} blobs sent, {made.bytes_sent / 1e6:.1f} MB\ndigest {made.document.digest}")


def _exit_on_sigterm() -> None:
    """Let SIGTERM end the command like Ctrl-C, so that unfinished work is cleaned up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _parse_argument(text: str) -> tuple[str, str]:
    return _parse_pair("--build-arg", text)


def _parse_pair(option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise BadInputError(f"{option} {text!r} has no value", next_step=f"write {option} NAME=VALUE")
    return name, value


def _parse_words(option: str, text: str | None) -> list[str] | None:
    """Split a command into words like a shell."""
    try:
        return None if text is None else shlex.split(text)
    except ValueError as error:
        raise BadInputError(f"{option} {text!r} cannot be parsed: {error}", next_step="close the quotes") from error
