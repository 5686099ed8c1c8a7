"""weights: the commands for checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import PATH, Form, json_option, option, show
from chatterbox_prewarm.commands.progress import say
from chatterbox_prewarm.weights.fetch import check_commit
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, VARIANTS, get_variant

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.weights.record import WeightsRecord


@click.group()
def weights() -> None:
    """Fetch, synthesize, record and verify checkpoints."""


@weights.command("fetch", short_help="Download a checkpoint.")
@click.argument("directory", type=PATH)
@option("--variant", default=DEFAULT_VARIANT.name, type=click.Choice(list(VARIANTS)), help="Model variant.")
@option(
    "--revision",
    type=Form("commit", check_commit),
    help="Full commit hash. Default: the pinned commit of the variant.",
)
@json_option
def weights_fetch(directory: Path, variant: str, revision: str | None) -> None:
    """Download a checkpoint from the model hub into DIRECTORY at a pinned commit, verify it and record it."""
    from chatterbox_prewarm.state.places import check_weights_place
    from chatterbox_prewarm.weights.fetch import fetch

    check_weights_place(directory)
    record = fetch(directory, variant=get_variant(variant), revision=revision or None, say=say)
    _show_record(
        f"{directory}: {len(record.files)} files of {record.repository} at {record.revision}", directory, record
    )


@weights.command("synthesize", short_help="Make a checkpoint of random weights.")
@click.argument("directory", type=PATH)
@click.option(
    "--size",
    default="full",
    show_default=True,
    type=click.Choice(["full", "mini"]),
    help="full (3.2 GB, the published size) or mini.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random generator.")
@click.option(
    "--variant",
    default=DEFAULT_VARIANT.name,
    show_default=True,
    type=click.Choice(list(VARIANTS)),
    help="Model variant.",
)
@json_option
def weights_synthesize(directory: Path, size: str, seed: int, variant: str) -> None:
    """Make a checkpoint of random weights in DIRECTORY. Its speech is noise.

    An older synthetic checkpoint in DIRECTORY is replaced. If DIRECTORY has any other file, the command fails.
    """
    from chatterbox_prewarm.state.places import check_weights_place

    check_weights_place(directory)
    from chatterbox_prewarm.model.synthetic import synthesize
    from chatterbox_prewarm.system.json_subprocess import quiet_packages

    quiet_packages()
    say("generating random weights")
    record = synthesize(directory, size=size, seed=seed, variant=get_variant(variant))
    total = sum(file.size for file in record.files)
    text = f"{directory}: {total / 1e9:.2f} GB of random weights; the speech of this model is noise"
    _show_record(text, directory, record)


@weights.command("record", short_help="Record a checkpoint of your own.")
@click.argument("directory", type=PATH)
@click.option("--variant", default=DEFAULT_VARIANT.name, show_default=True, type=click.Choice(list(VARIANTS)))
@json_option
def weights_record(directory: Path, variant: str) -> None:
    """Record the digests of your own checkpoint in DIRECTORY."""
    from chatterbox_prewarm.weights.record import record
    from chatterbox_prewarm.weights.tensor_shapes import check_tensors

    check_tensors(directory, get_variant(variant))
    say(f"reading {directory}")
    written = record(directory, variant=get_variant(variant), repository="own", revision="unversioned")
    text = f"{directory}: recorded {len(written.files)} files, set digest {written.set_digest}"
    _show_record(text, directory, written)


@weights.command("verify", short_help="Check the files of a checkpoint.")
@click.argument("directory", type=PATH)
@json_option
def weights_verify(directory: Path) -> None:
    """Compare every file in DIRECTORY with its recorded digest, and the names and shapes of the tensors."""
    from chatterbox_prewarm.weights.record import verify
    from chatterbox_prewarm.weights.tensor_shapes import check_tensors

    say(f"reading {directory}")
    record = verify(directory)
    check_tensors(directory, get_variant(record.variant), record.synthetic)
    text = f"{directory}: {len(record.files)} files as recorded, set digest {record.set_digest}"
    _show_record(text, directory, record)


def _show_record(text: str, directory: Path, record: WeightsRecord) -> None:
    show(
        text,
        {
            "directory": directory,
            "variant": record.variant,
            "repository": record.repository,
            "revision": record.revision,
            "files": len(record.files),
            "bytes": sum(file.size for file in record.files),
            "set_digest": record.set_digest,
        },
    )
