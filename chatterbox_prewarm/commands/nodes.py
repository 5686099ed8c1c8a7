"""facts: the command that prints the facts of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands.options import DEVICE, PATH, check_output, show
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatterbox_prewarm.image.node_fit import NodeFit


@click.command(short_help="Print the facts of this node.")
@click.option("--device", type=DEVICE, help="Torch device of a start, such as cuda. Default: the device of the image.")
@click.option("--output", type=PATH, help="Write to this file instead of standard output.")
def facts(*, device: str | None, output: Path | None) -> None:
    """Print the facts of this node as JSON, for `verify --image IMAGE --host-facts FILE` on another machine."""
    from chatterbox_prewarm.state.node_facts import node_facts, node_facts_to_json

    if output is not None:
        check_output(output)
    text = node_facts_to_json(node_facts(device))
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(output, text)
        click.echo(f"wrote {output}")


def report_node_fit(node_fit: NodeFit, attestations: Sequence[str] = ()) -> None:
    """Print whether a start would hit every cache, and end with exit code 11 if not.

    Args:
        node_fit: how the states of an image fit a node.
        attestations: lines about the signed statements of the image.

    Raises:
        FingerprintMismatchError: a start would miss.
    """
    lines = node_fit.lines()
    document = {"hits": node_fit.hits, "lines": lines, "attestations": list(attestations)}
    show("\n".join([*lines, *attestations]), document)
    node_fit.require_hit()
