"""bake, pack, inspect, verify: the commands for a warm state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    device_option,
    insecure_option,
    option,
    parse_levels,
    parse_voice,
    profile_option,
    refuse_options,
    start_device_option,
    state_option,
    targets_option,
    trust_options,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.model.profiles import T3_DTYPES, default_execution

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.state.signature import Trust
    from chatterbox_prewarm.state.state import State

#: How `inspect` describes a state that was baked with --target.
_CROSS_COMPILED = "  compiled without the GPU: not tuned, and unproven until `prove` passes there"


@click.command(short_help="Warm the model up and write the warm state.")
@weights_option
@warm_option
@cache_option
@device_option
@targets_option
@profile_option("aot")
@option("--t3-dtype", default="float32", type=click.Choice(T3_DTYPES), help="Data type of T3's transformer.")
@click.option("--graphs/--no-graphs", default=None, help="Run T3's step as a CUDA graph. Default: on a GPU.")
@option("--levels", default="1,2,3", help="Warm-up levels, separated by commas.")
@click.option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Bake a voice from a clip; repeatable.")
@click.option("--without", multiple=True, metavar="FAMILY", help="Leave out a cache family; repeatable.")
@click.pass_context
def bake(
    context: click.Context,
    /,
    *,
    weights: Path,
    warm: Path,
    cache: Path,
    device: str,
    targets: tuple[str, ...],
    levels: str,
    voices: tuple[str, ...],
    without: tuple[str, ...],
    **execution: Any,
) -> None:
    """Warm the model up on this machine and write the warm state.

    With --target, compile for a GPU that this machine does not have. Run `prove` on that GPU afterwards. With several
    targets, or several checkpoints in --weights, --warm is a folder that gets a state for each.
    """
    from chatterbox_prewarm.bake.bake import bake as run_bake
    from chatterbox_prewarm.bake.options import BakeOptions
    from chatterbox_prewarm.bake.several import bake_several
    from chatterbox_prewarm.families.registry import FAMILIES
    from chatterbox_prewarm.weights.checkpoints import checkpoints_in

    if targets:
        refuse_options(context, {"levels"}, "--target, because without the GPU nothing is warmed up")

    if unknown := sorted(set(without) - set(FAMILIES)):
        raise BadInputError(f"there is no cache family {unknown[0]!r}", next_step=f"choose from: {', '.join(FAMILIES)}")
    options = BakeOptions(
        weights=weights,
        warm=warm,
        cache=cache,
        device=device,
        target=next(iter(targets), None),
        execution=default_execution(device, **execution),
        levels=parse_levels(levels),
        voices=dict(parse_voice(voice) for voice in voices),
        families=tuple(name for name in FAMILIES if name not in without),
    )

    def progress(line: str) -> None:
        click.echo(f"bake: {line}", err=True)

    if len(targets) > 1 or len(checkpoints_in(weights)) > 1:
        for name, manifest in bake_several(options, targets, progress=progress).items():
            click.echo(f"{warm / name}\n{_family_table(manifest)}")
    else:
        click.echo(_family_table(run_bake(options, progress=progress)))


@click.command(short_help="Pack a warm state as an image layer.")
@warm_option
@state_option
@click.option("--output", type=PATH, required=True, help="Path of the layer, a .tar.gz file.")
def pack(*, warm: Path, state: str | None, output: Path) -> None:
    """Pack a warm state as a deterministic image layer: the same state gives the same bytes.

    The layer unpacks to a folder with the state's key as its name, so that an image can hold several states.
    """
    from chatterbox_prewarm.image.layer import pack as pack_layer
    from chatterbox_prewarm.state.selection import state_path
    from chatterbox_prewarm.state.state import State

    layer = pack_layer(State.open(state_path(warm, state)), output)
    click.echo(f"{output}: {layer.size / 1e6:.1f} MB, digest sha256:{layer.digest}, diff id sha256:{layer.diff_id}")


@click.command(short_help="Show the contents of a warm state.")
@warm_option
@state_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@click.option("--diff", nargs=2, type=PATH, metavar="A B", help="Show how state B differs from state A.")
def inspect(*, warm: Path, state: str | None, as_json: bool, diff: tuple[Path, Path] | None) -> None:
    """Show the contents of a warm state and what it was baked for, or list the states of a folder.

    --diff ignores all other options. Its exit code is 0 for different states too.
    """
    from chatterbox_prewarm.state.manifest_file import manifest_to_json
    from chatterbox_prewarm.state.selection import state_path, states_in
    from chatterbox_prewarm.state.state import State

    if diff is not None:
        from chatterbox_prewarm.state.state_diff import differences

        one, other = (State.read(state_path(path)).manifest for path in diff)
        click.echo("\n".join(differences(one, other)) or "no difference")
        return
    states = states_in(warm)
    if state is None and len(states) > 1 and not as_json:
        for name, path in states.items():
            click.echo(_state_line(name, path))
        return
    selected = State.read(state_path(warm, state))
    if as_json:
        click.echo(manifest_to_json(selected.manifest), nl=False)
    else:
        click.echo(_summary(selected))


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
def verify(
    *, image: str | None, host_facts: Path | None, insecure: bool | None, device: str | None, **options: Any
) -> None:
    """Check every digest of a warm state and whether each family fits this machine; explain each difference.

    If --warm holds several states, check the one that a start would use here, and say why the others are not used. With
    --key or --expect-digest, first check that you can trust the state; the labels of an image cannot show that.
    """
    if image is not None:
        _refuse_trust(options["trust"])
        _verify_image(image, host_facts, device, insecure=insecure)
    elif host_facts is not None:
        raise BadInputError("--host-facts is for an image", next_step="add --image IMAGE")
    else:
        _verify_here(device=device, **options)


def _refuse_trust(trust: Trust) -> None:
    """Refuse the trust options for labels. Labels are not signed, so a result would look safer than it is.

    Raises:
        BadInputError: a trust option is set, on the command line or in the environment.
    """
    for name, value in (("key", trust.key), ("signature", trust.signature), ("expect-digest", trust.expected_digest)):
        if value is not None:
            option_name, variable = f"--{name}", name.upper().replace("-", "_")
            raise BadInputError(
                f"{option_name} is checked against the manifest of a state, but --image reads only labels",
                next_step=f"leave {option_name} out, or unset CHATTERBOX_PREWARM_{variable}; a start of the image "
                "checks it, and so does `verify` in a container of the image",
            )


def _verify_image(reference: str, host_facts: Path | None, device: str | None, *, insecure: bool | None) -> None:
    from chatterbox_prewarm.commands.nodes import report_node_fit
    from chatterbox_prewarm.image.compose import platform_of
    from chatterbox_prewarm.image.image_states import image_with_states
    from chatterbox_prewarm.image.node_fit import compare_with_node
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.state.node_facts import node_facts, read_node_facts

    facts = read_node_facts(host_facts) if host_facts else node_facts(device)
    _, image = image_with_states(parse(reference), platform=platform_of(facts["arch"]), insecure=insecure)
    report_node_fit(compare_with_node(image, facts))


def _verify_here(
    *, warm: Path, state: str | None, device: str | None, weights: Path, cache: Path, trust: Trust
) -> None:
    from chatterbox_prewarm.state.compatibility import machine_facts
    from chatterbox_prewarm.state.selection import Request, checkpoints_for, select_state
    from chatterbox_prewarm.state.verify import verify as verify_state

    for checkpoint in checkpoints_for(weights, warm, state).values():

        def facts(candidate: State, weights: Path = checkpoint) -> Mapping[str, str]:
            return machine_facts(weights, cache, device or candidate.manifest.reference.device)

        selection = select_state(warm, facts, Request(device=device, name=state, strict=True, trust=trust))
        for line in (*selection.remarks, *verify_state(selection.state, checkpoint, cache)):
            click.echo(line)


def _state_line(name: str, path: Path) -> str:
    """Describe one of several states in a line."""
    from chatterbox_prewarm.state.state import State

    try:
        state = State.read(path)
    except IntegrityError as error:
        return f"{name}: cannot be used: {error.message}"
    size = sum(family.size for family in state.manifest.families)
    return f"{name}: {state.key}, {size:,} bytes, set digest {state.manifest.set_digest}"


def _summary(state: State) -> str:
    """Describe a state in lines."""
    manifest = state.manifest
    execution, provenance, cost = manifest.execution, manifest.provenance, manifest.measured
    levels = ", ".join(map(str, manifest.levels)) or "none"
    graphs = "with" if execution.graphs else "without"
    facts = ("arch", "cpu_model", "gpu", "compute_capability", "driver", "python", "torch", "numba")
    return "\n".join(
        [
            f"warm state {manifest.set_digest}",
            f"  key {state.key}",
            f"  manifest sha256:{state.manifest_digest}, the value for --expect-digest",
            f"  made by {manifest.tool} on {manifest.created}, levels {levels}",
            *([_CROSS_COMPILED] if manifest.cross_compiled else []),
            f"  {manifest.variant}, voices: {', '.join(manifest.voices)}",
            f"  profile {execution.profile}, T3 in {execution.t3_dtype}, {graphs} CUDA graphs",
            f"  weights {manifest.weights.repository} at {manifest.weights.revision}",
            f"  sources {provenance.source} at revision {provenance.revision}, base image {provenance.base_image}",
            f"  packages {provenance.packages}, builder {provenance.builder}",
            f"  warm start {cost.ready_seconds:.1f} s to ready; cold start {cost.cold_seconds:.1f} s to attached",
            f"  peak memory: {cost.resident_bytes / 1e6:.0f} MB, {cost.device_bytes / 1e6:.0f} MB of the GPU",
            *(f"  {name}: {manifest.fingerprint.get(name, 'not recorded')}" for name in facts),
            _family_table(manifest),
        ]
    )


def _family_table(manifest: Manifest) -> str:
    lines = [f"  {'family':<14}{'files':>6}{'bytes':>14}{'spent s':>10}{'saved s':>10}"]
    for family in manifest.families:
        # A node that pulls 100 MB/s waits this long for the family's bytes.
        remark = "  saves less than it costs" if family.seconds_saved < family.size / 100e6 else ""
        lines.append(
            f"  {family.name:<14}{len(family.files):>6}{family.size:>14,}{family.seconds_spent:>10.2f}"
            f"{family.seconds_saved:>10.2f}{remark}"
        )
    return "\n".join(lines)
