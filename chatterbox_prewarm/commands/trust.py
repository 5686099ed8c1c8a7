"""sign, sbom: who vouches for a warm state, and what an image is made of."""

from __future__ import annotations

import os
from pathlib import Path

import click

from chatterbox_prewarm.commands.options import PATH, check_place, warm_option, weights_option
from chatterbox_prewarm.system.atomic_files import write_whole


@click.command()
@warm_option
@click.option("--key", type=PATH, required=True, help="The private key, a PEM file of the curve P-256, P-384 or P-521.")
@click.option("--output", type=PATH, help="Where the signature goes; beside the state, with .sig, by default.")
def sign(*, warm: Path, key: Path, output: Path | None) -> None:
    """Sign a warm state, so that a start with --key knows who vouches for it. Uses no network.

    The passphrase of an encrypted key is read from CHATTERBOX_PREWARM_PASSPHRASE.
    """
    from chatterbox_prewarm.state.keys import PASSPHRASE
    from chatterbox_prewarm.state.manifest import manifest_digest
    from chatterbox_prewarm.state.signing import sign as sign_state

    signature = sign_state(warm, key, output, passphrase=os.environ.get(PASSPHRASE) or None)
    click.echo(f"{signature}: signs {warm}, manifest sha256:{manifest_digest(warm)}")


@click.command()
@warm_option
@weights_option
@click.option("--root", type=PATH, default=Path("/"), show_default=True, help="Of the file system to list packages of.")
@click.option("--output", type=PATH, help="Where the document goes; standard output by default.")
def sbom(*, warm: Path, weights: Path, root: Path, output: Path | None) -> None:
    """List what an image is made of, as CycloneDX 1.6: packages, weights and warm state, files with their digests."""
    from chatterbox_prewarm.image.sbom import make_sbom

    if output is not None:
        check_place(output)
    document = make_sbom(warm, weights, root=root)
    if output is None:
        click.echo(document, nl=False)
    else:
        write_whole(output, document)
