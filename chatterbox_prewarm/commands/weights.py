"""weights: the commands for checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import PATH, option
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, VARIANTS, get_variant

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def weights() -> None:
    """Fetch, synthesize, record and verify checkpoints."""


@weights.command("fetch", short_help="Download a checkpoint.")
@click.argument("directory", type=PATH)
@option("--variant", default=DEFAULT_VARIANT.name, type=click.Choice(list(VARIANTS)), help="Model variant.")
@option("--revision", help="Full commit hash. Default: the pinned commit of the variant.")
def weights_fetch(directory: Path, variant: str, revision: str | None) -> None:
    """Download a checkpoint from the model hub into DIRECTORY at a pinned commit, verify it and record it."""
    from chatterbox_prewarm.state.places import check_weights_place
    from chatterbox_prewarm.weights.fetch import fetch

    check_weights_place(directory)
    record = fetch(directory, variant=get_variant(variant), revision=revision or None)
    click.echo(f"{directory}: {len(record.files)} files of {record.repository} at {record.revision}")


@weights.command("synthesize", short_help="Make a checkpoint of random weights.")
@click.argument("directory", type=PATH)
@click.option("--size", default="full", show_default=True, help="full (3.2 GB, the published size) or mini.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random generator.")
@click.option(
    "--variant",
    default=DEFAULT_VARIANT.name,
    show_default=True,
    type=click.Choice(list(VARIANTS)),
    help="Model variant.",
)
def weights_synthesize(directory: Path, size: str, seed: int, variant: str) -> None:
    """Make a checkpoint of random weights in DIRECTORY. Its speech is noise.

    An older synthetic checkpoint in DIRECTORY is replaced. If DIRECTORY has any other file, the command fails.
    """
    from chatterbox_prewarm.state.places import check_weights_place

    check_weights_place(directory)
    from chatterbox_prewarm.model.synthetic import synthesize
    from chatterbox_prewarm.system.json_subprocess import quiet_packages

    quiet_packages()
    record = synthesize(directory, size=size, seed=seed, variant=get_variant(variant))
    total = sum(file.size for file in record.files)
    click.echo(f"{directory}: {total / 1e9:.2f} GB of random weights; the speech of this model is noise")


@weights.command("record", short_help="Record a checkpoint of your own.")
@click.argument("directory", type=PATH)
@click.option("--variant", default=DEFAULT_VARIANT.name, show_default=True, type=click.Choice(list(VARIANTS)))
def weights_record(directory: Path, variant: str) -> None:
    """Record the digests of your own checkpoint in DIRECTORY."""
    from chatterbox_prewarm.weights.record import record
    from chatterbox_prewarm.weights.tensor_shapes import check_tensors

    check_tensors(directory, get_variant(variant))
    written = record(directory, variant=get_variant(variant), repository="own", revision="unversioned")
    click.echo(f"{directory}: recorded {len(written.files)} files, set digest {written.set_digest}")


@weights.command("verify", short_help="Check the files of a checkpoint.")
@click.argument("directory", type=PATH)
def weights_verify(directory: Path) -> None:
    """Compare every file in DIRECTORY with its recorded digest, and the names and shapes of the tensors."""
    from chatterbox_prewarm.weights.record import verify
    from chatterbox_prewarm.weights.tensor_shapes import check_tensors

    record = verify(directory)
    check_tensors(directory, get_variant(record.variant), record.synthetic)
    click.echo(f"{directory}: {len(record.files)} files as recorded, set digest {record.set_digest}")
