"""prove: the command that shows that a warm state is used."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_output,
    option,
    start_device_option,
    state_option,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.engines.engine import ENGINES
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.proof.checks import Evidence


@click.command(short_help="Show that a fresh process hits every cache.")
@warm_option
@state_option
@start_device_option
@weights_option
@cache_option
@click.option("--evidence", type=PATH, help="Write the evidence to this JSON file, or to standard output (-).")
@click.option("--here", is_flag=True, help="Do not isolate the process: it is isolated already, as in a container.")
@option("--variant", metavar="NAME", help="Model to prove, if --weights has several checkpoints. Default: all.")
@click.option("--image", help="Prove in a container of this image, with the flags of the README.")
@option("--engine", default="docker", type=click.Choice(ENGINES), help="The engine that has the image.")
def prove(
    *, evidence: Path | None, here: bool, variant: str | None, image: str | None, engine: str, **options: Any
) -> None:
    """Show that a fresh, isolated process hits every cache and misses none. Exit code 13 if it does not.

    If --warm holds several states, prove the ones that a start would use here, one for each model. With --image the
    paths and the states are those of the image. --cache is used only with --here; otherwise the cache is a new folder.
    """
    from chatterbox_prewarm.proof.checks import remove_older_evidence, require_passed

    if evidence is not None and str(evidence) != "-":
        check_output(evidence)
        remove_older_evidence(evidence)
    proofs = _proofs_of_image(image, engine, variant) if image else _proofs_here(variant, here=here, **options)
    if evidence is not None and len(proofs) > 1:
        raise BadInputError(
            f"--evidence is a file for one proof, and there are {len(proofs)} models: {', '.join(proofs)}",
            next_step="prove them one by one: add --variant NAME",
        )
    for name, run in proofs.items():
        result = run()
        _write_evidence(result, evidence)
        if len(proofs) > 1:
            click.echo(f"model {name}:")
        for check in result.checks:
            click.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}", err=str(evidence) == "-")
        require_passed(result, "standard output" if str(evidence) == "-" else evidence or "")


def _proofs_of_image(image: str, engine: str, variant: str | None) -> dict[str, Callable[[], Evidence]]:
    """Return a function for each model of an image, or for one of them, that proves it in a container."""
    from chatterbox_prewarm.image.engines.connect import image_variants, prove_image

    variants = image_variants(image, engine=engine)
    if variant is not None and variant not in variants:
        raise BadInputError(f"{image} has no model {variant}", next_step=f"choose one of: {', '.join(variants)}")
    # An image of an older version does not know the option --variant.
    chosen = {name: name if len(variants) > 1 else None for name in variants if variant in {None, name}}
    return {
        name: functools.partial(prove_image, image, engine=engine, variant=option) for name, option in chosen.items()
    }


def _proofs_here(
    variant: str | None, *, here: bool, warm: Path, weights: Path, cache: Path, device: str | None, state: str | None
) -> dict[str, Callable[[], Evidence]]:
    """Return a function for each checkpoint, or for one of them, that proves its state on this machine."""
    from chatterbox_prewarm.proof.prove import ProofOptions, prove_here
    from chatterbox_prewarm.proof.prove import prove as prove_isolated
    from chatterbox_prewarm.state.selection import checkpoints_for
    from chatterbox_prewarm.weights.checkpoints import choose_checkpoints

    chosen = choose_checkpoints(weights, [variant]) if variant else checkpoints_for(weights, warm, state)
    proofs = {
        name: ProofOptions(warm=warm, weights=checkpoint, device=device, name=state)
        for name, checkpoint in chosen.items()
    }
    return {
        name: functools.partial(prove_here, proof, cache) if here else functools.partial(prove_isolated, proof)
        for name, proof in proofs.items()
    }


def _write_evidence(result: Evidence, path: Path | None) -> None:
    if str(path) == "-":
        click.echo(result.to_json(), nl=False)
    elif path is not None:
        write_whole(path, result.to_json())
