"""verify, prove: the commands that check a warm state."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    Form,
    cache_option,
    check_output,
    insecure_option,
    json_option,
    option,
    show,
    start_device_option,
    state_option,
    trust_options,
    usage_error,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.commands.progress import end, say
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.engines.engine import ENGINES
from chatterbox_prewarm.system.atomic_files import write_whole
from chatterbox_prewarm.weights.variants import VARIANTS, get_variant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from chatterbox_prewarm.proof.checks import Evidence
    from chatterbox_prewarm.state.signature import Trust
    from chatterbox_prewarm.state.state import State


@click.command(short_help="Check that a state is intact and fits this machine.")
@warm_option
@state_option
@start_device_option
@weights_option
@cache_option
@trust_options
@click.option("--image", metavar="IMAGE", help="Check only the labels of an image; it is not pulled.")
@click.option("--host-facts", type=PATH, help="With --image: the node, as written by `facts`. Default: this machine.")
@insecure_option
@json_option
def verify(
    *, image: str | None, host_facts: Path | None, insecure: bool | None, device: str | None, **options: Any
) -> None:
    """Check every digest of a warm state and whether each family fits this machine; explain each difference.

    If --warm holds several states, check the one that a start would use here, and say why the others are not used. With
    --key or --expect-digest, first check that you can trust the state. With --image and --key, check that the image has
    a proof of the state that fits, signed with that key by `attest --key`.
    """
    if image is not None:
        _refuse_trust(options["trust"])
        _verify_image(image, host_facts, device, insecure=insecure, key=options["trust"].key)
    elif host_facts is not None:
        raise usage_error("--host-facts is for an image", "add --image IMAGE")
    else:
        _verify_here(device=device, **options)


def _refuse_trust(trust: Trust) -> None:
    """Refuse the trust options for labels. Labels are not signed, so a result would look safer than it is.

    Raises:
        click.UsageError: a trust option is set, on the command line or in the environment.
    """
    for name, value in (("signature", trust.signature), ("expect-digest", trust.expected_digest)):
        if value is not None:
            option_name, variable = f"--{name}", name.upper().replace("-", "_")
            raise usage_error(
                f"{option_name} is checked against the manifest of a state, but --image reads only labels",
                f"leave {option_name} out, or unset CHATTERBOX_PREWARM_{variable}; a start of the image "
                "checks it, and so does `verify` in a container of the image",
            )


def _verify_image(
    reference: str, host_facts: Path | None, device: str | None, *, insecure: bool | None, key: Path | None
) -> None:
    from chatterbox_prewarm.commands.nodes import report_node_fit
    from chatterbox_prewarm.image.compose import platform_of
    from chatterbox_prewarm.image.image_states import attested_image, image_with_states
    from chatterbox_prewarm.image.node_fit import compare_with_node
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.state.keys import read_public_key
    from chatterbox_prewarm.state.node_facts import node_facts, read_node_facts

    facts = read_node_facts(host_facts) if host_facts else node_facts(device)
    platform = platform_of(facts["arch"])
    if key is None:
        _, image = image_with_states(parse(reference), platform=platform, insecure=insecure)
        report_node_fit(compare_with_node(image, facts))
        return
    image, attestations = attested_image(parse(reference), read_public_key(key), platform=platform, insecure=insecure)
    node_fit = compare_with_node(image, facts)
    for state in node_fit.selected.values():
        attestations.require_proof(reference, state.name)
    report_node_fit(node_fit, attestations.lines())


def _verify_here(
    *, warm: Path, state: str | None, device: str | None, weights: Path, cache: Path, trust: Trust
) -> None:
    from chatterbox_prewarm.state.compatibility import machine_facts
    from chatterbox_prewarm.state.selection import Request, checkpoints_for, select_state
    from chatterbox_prewarm.state.signature import check_trust_for_models
    from chatterbox_prewarm.state.verify import verify as verify_state

    found: list[dict[str, Any]] = []
    checkpoints = checkpoints_for(weights, warm, state)
    check_trust_for_models(trust, checkpoints)
    for checkpoint in checkpoints.values():

        def facts(candidate: State, weights: Path = checkpoint) -> Mapping[str, str]:
            return machine_facts(weights, cache, device or candidate.manifest.reference.device)

        selection = select_state(warm, facts, Request(device=device, name=state, strict=True, trust=trust))
        say(f"verifying {selection.state.path}")
        lines = [*selection.remarks, *verify_state(selection.state, checkpoint, cache)]
        found.append({"state": selection.state.path, "key": selection.state.key, "lines": lines})
    text = "\n".join(line for each in found for line in each["lines"])
    show(text, found[0] if len(found) == 1 else {"states": found})


@click.command(short_help="Show that a fresh process hits every cache.")
@warm_option
@state_option
@start_device_option
@weights_option
@cache_option
@click.option("--evidence", type=PATH, help="Write the evidence to this JSON file, or to standard output (-).")
@click.option("--here", is_flag=True, help="Do not isolate the process: it is isolated already, as in a container.")
@click.option(
    "--variant",
    metavar="NAME",
    type=Form("model", get_variant),
    help="Model to prove, if --weights has several checkpoints. Default: all.",
)
@click.option("--convert", "converts", is_flag=True, help="Prove the conversion of speech, see `serve --convert`.")
@click.option("--image", help="Prove in a container of this image, with the flags of the README.")
@option("--engine", default="docker", type=click.Choice(ENGINES), help="The engine that has the image.")
@json_option
def prove(
    *,
    evidence: Path | None,
    here: bool,
    variant: str | None,
    converts: bool,
    image: str | None,
    engine: str,
    **options: Any,
) -> None:
    """Show that a fresh, isolated process hits every cache and misses none. Exit code 13 if it does not.

    If --warm holds several states, prove the ones that a start would use here, one for each model. With --image the
    paths and the states are those of the image. --cache is used only with --here; otherwise the cache is a new folder.

    The process repeats a synthesis of the bake, and its audio must be identical. With --convert it converts speech with
    the first model, or with --variant, and the audio must be like that of eager mode.
    """
    from chatterbox_prewarm.proof.checks import remove_older_evidence, require_passed

    if image:
        proofs = _proofs_of_image(image, engine, variant, converts=converts)
    else:
        proofs = _proofs_here(variant, here=here, converts=converts, **options)
    if evidence is not None and len(proofs) > 1:
        raise BadInputError(
            f"--evidence is a file for one proof, and there are {len(proofs)} models: {', '.join(proofs)}",
            next_step="prove them one by one: add --variant NAME",
        )
    if evidence is not None and str(evidence) != "-":
        check_output(evidence)
        remove_older_evidence(evidence)
    results = {}
    for name, run in proofs.items():
        say(f"proving {name + ' of ' if len(proofs) > 1 else ''}{image or options['warm']} in a fresh process")
        results[name] = run()
    end()
    for result in results.values():
        _write_evidence(result, evidence)
    lines = [line for name, result in results.items() for line in _lines(name if len(proofs) > 1 else "", result)]
    if str(evidence) == "-":
        click.echo("\n".join(lines), err=True)
    else:
        documents = {name: result.to_document() for name, result in results.items()}
        show("\n".join(lines), documents if len(documents) > 1 else next(iter(documents.values())))
    for result in results.values():
        require_passed(result, "standard output" if str(evidence) == "-" else evidence or "")


def _lines(model: str, result: Evidence) -> list[str]:
    """Return a line for each check, under the name of the model if it has one here."""
    checks = [f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}" for check in result.checks]
    return [*([f"model {model}:"] if model else []), *checks]


def _proofs_of_image(
    image: str, engine: str, variant: str | None, *, converts: bool
) -> dict[str, Callable[[], Evidence]]:
    """Return a function for each model of an image, or for one of them, that proves it in a container."""
    from chatterbox_prewarm.image.engines.connect import image_variants, prove_image

    variants = image_variants(image, engine=engine)
    if variant is not None and variant not in variants:
        raise BadInputError(f"{image} has no model {variant}", next_step=f"choose one of: {', '.join(variants)}")
    # An image of an older version does not know the option --variant.
    chosen = {name: name if len(variants) > 1 else None for name in variants if variant in {None, name}}
    if converts:  # with the model that a start takes
        first = next(name for name in VARIANTS if name in chosen)
        chosen = {first: chosen[first]}
    return {
        name: functools.partial(prove_image, image, engine=engine, variant=option, converts=converts)
        for name, option in chosen.items()
    }


def _proofs_here(
    variant: str | None,
    *,
    here: bool,
    converts: bool,
    warm: Path,
    weights: Path,
    cache: Path,
    device: str | None,
    state: str | None,
) -> dict[str, Callable[[], Evidence]]:
    """Return a function for each checkpoint, or for one of them, that proves its state on this machine."""
    from chatterbox_prewarm.proof.prove import ProofOptions, prove_here
    from chatterbox_prewarm.proof.prove import prove as prove_isolated
    from chatterbox_prewarm.state.selection import checkpoints_for
    from chatterbox_prewarm.weights.checkpoints import choose_checkpoints

    chosen = choose_checkpoints(weights, [variant]) if variant else checkpoints_for(weights, warm, state)
    if converts:
        chosen = dict(list(chosen.items())[:1])
    proofs = {
        name: ProofOptions(warm=warm, weights=checkpoint, device=device, name=state, converts=converts)
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
