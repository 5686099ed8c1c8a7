"""sign, sbom: the commands for signatures and bills of materials."""

from __future__ import annotations

import os
from pathlib import Path

import click

from chatterbox_prewarm.commands.options import PATH, check_output, json_option, show, warm_option, weights_option
from chatterbox_prewarm.system.atomic_files import write_whole


@click.command(short_help="Sign a warm state.")
@warm_option
@click.option("--key", type=PATH, required=True, help="Private key, a PEM file of the curve P-256, P-384 or P-521.")
@click.option("--output", type=PATH, help="Path of the signature. Default: next to the state, with .sig.")
@json_option
def sign(*, warm: Path, key: Path, output: Path | None) -> None:
    """Sign a warm state, so that a start with --key can check who made it. Uses no network.

    The passphrase of an encrypted key is read from CHATTERBOX_PREWARM_PASSPHRASE.
    """
    from chatterbox_prewarm.state.keys import PASSPHRASE
    from chatterbox_prewarm.state.signing import sign as sign_state
    from chatterbox_prewarm.state.state import State

    state = State.open(warm)
    signature = sign_state(state, key, output, passphrase=os.environ.get(PASSPHRASE) or None)
    show(
        f"{signature}: signs {warm}, manifest sha256:{state.manifest_digest}",
        {"signature": signature, "state": warm, "manifest_digest": f"sha256:{state.manifest_digest}"},
    )


@click.command(short_help="List the contents of an image, as CycloneDX.")
@warm_option
@weights_option
@click.option(
    "--root", type=PATH, default=Path("/"), show_default=True, help="Root of the file system whose packages are listed."
)
@click.option("--output", type=PATH, help="Path of the document. Default: standard output.")
def sbom(*, warm: Path, weights: Path, root: Path, output: Path | None) -> None:
    """List the contents of an image, as CycloneDX 1.6: packages, weights and warm states, with digests of files."""
    from chatterbox_prewarm.image.sbom import make_sbom

    if output is not None:
        check_output(output)
    document = make_sbom(warm, weights, root=root)
    if output is None:
        click.echo(document, nl=False)
    else:
        write_whole(output, document)
