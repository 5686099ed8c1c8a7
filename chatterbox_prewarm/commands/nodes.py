"""facts: what of a node decides whether a warm state fits it; and how a verdict on an image is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import PATH, check_place
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.node_fit import Verdict


@click.command()
@click.option("--device", help="The torch device that a start there would have, such as cuda; the image's by default.")
@click.option("--output", type=PATH, help="Write to this file instead of standard output.")
def facts(*, device: str | None, output: Path | None) -> None:
    """Print this node's facts as JSON, for `verify --image IMAGE --host-facts FILE` on another machine."""
    from chatterbox_prewarm.state.node_facts import host_facts, to_json

    if output is not None:
        check_place(output)
    text = to_json(host_facts(device))
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(output, text)
        click.echo(f"wrote {output}")


def report_verdict(verdict: Verdict) -> None:
    """Say whether a start would hit, and end with 11 if it would not.

    Raises:
        FingerprintMismatchError: it would not.
    """
    for line in verdict.lines():
        click.echo(line)
    verdict.require_hit()
