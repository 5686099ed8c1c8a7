"""sign, sbom: who vouches for a warm state, and what an image is made of."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import PATH, warm_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@warm_option
@click.option("--key", type=PATH, required=True, help="The private key, a PEM file of the curve P-256, P-384 or P-521.")
@click.option("--output", type=PATH, help="Where the signature goes; beside the state, with .sig, by default.")
def sign(*, warm: Path, key: Path, output: Path | None) -> None:
    """Sign a warm state, so that a start with --key knows who vouches for it. Uses no network.

    The passphrase of an encrypted key is read from CHATTERBOX_PREWARM_PASSPHRASE.
    """
    from chatterbox_prewarm import manifest as manifests
    from chatterbox_prewarm.keys import PASSPHRASE
    from chatterbox_prewarm.signing import sign as sign_state

    signature = sign_state(warm, key, output, passphrase=os.environ.get(PASSPHRASE) or None)
    click.echo(f"{signature}: signs {warm}, manifest sha256:{manifests.file_digest(warm)}")
