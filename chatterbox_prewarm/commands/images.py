"""append, attest, publish: the commands that change an image in a registry, a layout or an archive."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    DEVICE,
    PATH,
    cache_option,
    exit_on_sigterm,
    insecure_option,
    json_option,
    option,
    parse_pair,
    read_signing_key,
    refuse_options,
    show,
    signing_key_option,
    usage_error,
    weights_option,
)
from chatterbox_prewarm.commands.progress import say, unattended
from chatterbox_prewarm.image.matrix import MATRIX_NAME
from chatterbox_prewarm.system.paths import WARM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.image.append import AppendResult
    from chatterbox_prewarm.image.matrix import Bake

#: Where `publish` writes the new state in its container.
_NEW_STATE = Path("/tmp/warm")  # noqa: S108


@click.command(short_help="Add warm states to an image.")
@click.option("--base", required=True, metavar="IMAGE", help="Image to which the states are added.")
@click.option("--to", "target", required=True, metavar="IMAGE", help="Name and destination of the result.")
@click.option(
    "--warm", "states", multiple=True, required=True, type=PATH, help="State, or folder of states; repeatable."
)
@click.option("--weights", type=PATH, help="Checkpoint to add.")
@click.option("--platform", default="", help="Platform of the base, such as linux/amd64. Default: of the states.")
@click.option(
    "--device",
    default="",
    type=DEVICE,
    help="Device of a start. Default: the device of the base, or else of the states.",
)
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
@json_option
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
        labels=dict(parse_pair("--label", text) for text in labels),
        environment=dict(parse_pair("--env", text) for text in variables),
        entrypoint=_parse_words("--entrypoint", entrypoint),
        command=_parse_words("--cmd", command),
    )
    exit_on_sigterm()
    say("packing the states")
    with pack_states(states, weights) as addition:
        made = append_image(below, result, addition, AppendOptions(settings=settings, say=say, **more))
    _print_result(result, made)


@click.command(short_help="Attach the evidence of a proof to an image.")
@click.option("--image", required=True, metavar="IMAGE", help="Image in a registry or an OCI layout.")
@click.option("--evidence", required=True, type=PATH, help="File that `prove --evidence` wrote.")
@signing_key_option
@click.option(
    "--predicates", type=PATH, help="Only write proof.json and provenance.json to this folder, for `cosign attest`."
)
@insecure_option
@json_option
def attest(*, image: str, evidence: Path, key: Path | None, predicates: Path | None, insecure: bool | None) -> None:
    """Attach the evidence of a proof to an image as an OCI referrer. The image does not change.

    With --key, also attach two signed statements of in-toto, which admission controllers can require: the result of the
    proof as a test result, and the provenance of the state in the form of SLSA. Then IMAGE must be a digest,
    NAME@sha256:..., because a tag can move after the proof. The passphrase of an encrypted key is read from
    CHATTERBOX_PREWARM_PASSPHRASE.
    """
    from chatterbox_prewarm.image.attest import attach_evidence, write_predicates
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.stores import open_store

    signing_key = read_signing_key(key)
    with open_store(parse(image), insecure=insecure) as (store, name):
        if predicates is not None:
            written = write_predicates(store, name, evidence, predicates)
            show("\n".join(f"wrote {path}" for path in written), {"predicates": written})
            return
        digest = attach_evidence(store, name, evidence, key=signing_key)
    _show_attached(image, digest)


@click.command(short_help="Bake, prove and publish on this node.")
@click.option("--matrix", type=PATH, default=Path(MATRIX_NAME), show_default=True, help="File that lists the bakes.")
@click.option("--index", type=click.IntRange(0), envvar="JOB_COMPLETION_INDEX", show_envvar=True, help="Bake to run.")
@click.option("--list", "listing", is_flag=True, help="Only list the bakes with their numbers.")
@click.option("--prove-only", "image", metavar="IMAGE", help="Only prove this image, in a container of it.")
@click.option("--state", help="With --prove-only: the state to prove. Default: those that a start would use here.")
@option("--warm", type=PATH, help=f"Directory of the new state. Default: {_NEW_STATE}; with --prove-only, {WARM}.")
@weights_option
@cache_option
@signing_key_option
@insecure_option
@json_option
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
    key: Path | None,
    **places: Any,
) -> None:
    """Bake on this node without a container engine, prove the state, and add it to an image in a registry.

    For a Kubernetes Job. It runs in an image of the stage `tools`; the base of the matrix is an image of the stage
    `cold`. With --prove-only, it runs in an image that has a state, proves that state on this node, and attaches the
    evidence to the image in the registry. With --prove-only and --key, IMAGE must be a digest.
    """
    from chatterbox_prewarm.image import matrix as matrices
    from chatterbox_prewarm.image import publish as publishing

    unattended()
    places["key"] = read_signing_key(key)
    if image is not None:
        refuse_options(context, {"matrix", "index", "listing"}, "--prove-only")
        options = publishing.PublishOptions(warm=warm or WARM, say=say, **places)
        digests = publishing.prove_image(image, options, name=state)
        lines = "\n".join(f"{image}: evidence attached as {digest}" for digest in digests)
        show(lines, {"image": image, "digests": digests})
        return
    if state is not None:
        raise click.UsageError("--state needs --prove-only.")
    found = matrices.read_matrix(matrix)
    if listing:
        _show_bakes(found.bakes)
        return
    if index is None or index >= len(found.bakes):
        raise usage_error(f"{matrix} has {len(found.bakes)} bakes, but --index is {index}", "see publish --list")
    exit_on_sigterm()
    options = publishing.PublishOptions(warm=warm or _NEW_STATE, say=say, **places)
    made = publishing.publish(found.bakes[index], found.base, found.target, options)
    _print_result(found.target, made)


def _show_bakes(bakes: Sequence[Bake]) -> None:
    lines = [f"{n}: {bake.title}, {', '.join(bake.voices) or 'no added voices'}" for n, bake in enumerate(bakes)]
    listed = [{"index": n, "title": bake.title, "voices": list(bake.voices)} for n, bake in enumerate(bakes)]
    show("\n".join(lines), {"bakes": listed})


def _print_result(image: object, made: AppendResult) -> None:
    show(
        f"{image}: {made.blobs_sent} blobs sent, {made.bytes_sent / 1e6:.1f} MB\ndigest {made.document.digest}",
        {
            "image": image,
            "digest": made.document.digest,
            "blobs_sent": made.blobs_sent,
            "bytes_sent": made.bytes_sent,
        },
    )


def _show_attached(image: str, digest: str) -> None:
    show(f"{image}: evidence attached as {digest}", {"image": image, "digest": digest})


def _parse_words(option: str, text: str | None) -> list[str] | None:
    """Split a command into words like a shell."""
    try:
        return None if text is None else shlex.split(text)
    except ValueError as error:
        raise usage_error(f"{option} {text!r} cannot be parsed: {error}", "close the quotes") from error
