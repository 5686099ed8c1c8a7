"""bake, pack, inspect: the commands for a warm state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    device_option,
    json_option,
    option,
    parse_levels,
    parse_voice,
    profile_option,
    refuse_options,
    show,
    state_option,
    targets_option,
    usage_error,
    wants_json,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.commands.progress import say
from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.model.profiles import T3_DTYPES, default_execution

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest
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
@json_option
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
        raise usage_error(f"there is no cache family {unknown[0]!r}", f"choose from: {', '.join(FAMILIES)}")
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

    checkpoints = checkpoints_in(weights)
    if len(targets) > 1 or len(checkpoints) > 1:
        made = bake_several(options, targets, progress=say)
        baked = {warm / name: manifest for name, manifest in made.items()}
        text = "\n".join(f"{path}\n{_family_table(manifest)}" for path, manifest in baked.items())
    else:
        options = replace(options, weights=next(iter(checkpoints.values())))
        baked = {warm: run_bake(options, progress=say)}
        text = _family_table(baked[warm])
    show(text, {"states": [_to_document(path, manifest) for path, manifest in baked.items()]})


def _to_document(path: Path, manifest: Manifest) -> dict[str, Any]:
    from chatterbox_prewarm.state.state import state_key

    return {
        "path": path,
        "key": state_key(manifest),
        "set_digest": manifest.set_digest,
        "families": [
            {
                "name": family.name,
                "files": len(family.files),
                "bytes": family.size,
                "seconds_spent": family.seconds_spent,
                "seconds_saved": family.seconds_saved,
            }
            for family in manifest.families
        ],
    }


@click.command(short_help="Pack a warm state as an image layer.")
@warm_option
@state_option
@click.option("--output", type=PATH, required=True, help="Path of the layer, a .tar.gz file.")
@json_option
def pack(*, warm: Path, state: str | None, output: Path) -> None:
    """Pack a warm state as a deterministic image layer: the same state gives the same bytes.

    The layer unpacks to a folder with the state's key as its name, so that an image can hold several states.
    """
    from chatterbox_prewarm.image.layer import pack as pack_layer
    from chatterbox_prewarm.state.selection import state_path
    from chatterbox_prewarm.state.state import State

    say(f"packing {warm}")
    layer = pack_layer(State.open(state_path(warm, state)), output)
    digest, diff_id = f"sha256:{layer.digest}", f"sha256:{layer.diff_id}"
    show(
        f"{output}: {layer.size / 1e6:.1f} MB, digest {digest}, diff id {diff_id}",
        {"output": output, "bytes": layer.size, "digest": digest, "diff_id": diff_id},
    )


@click.command(short_help="Show the contents of a warm state.")
@warm_option
@state_option
@json_option
@click.option("--diff", nargs=2, type=PATH, metavar="A B", help="Show how state B differs from state A.")
def inspect(*, warm: Path, state: str | None, diff: tuple[Path, Path] | None) -> None:
    """Show the contents of a warm state and what it was baked for, or list the states of a folder.

    With --json, the result is the manifest of the state. --diff ignores the options that choose a state. Its exit code
    is 0 for different states too.
    """
    from chatterbox_prewarm.state.manifest_file import manifest_to_json
    from chatterbox_prewarm.state.selection import state_path, states_in
    from chatterbox_prewarm.state.state import State

    if diff is not None:
        from chatterbox_prewarm.state.state_diff import differences

        one, other = (State.read(state_path(path)).manifest for path in diff)
        found = differences(one, other)
        show("\n".join(found) or "no difference", {"differences": found})
        return
    states = states_in(warm)
    if state is None and len(states) > 1:
        lines = {name: _state_line(name, path) for name, path in states.items()}
        show("\n".join(lines.values()), {"states": lines})
        return
    selected = State.read(state_path(warm, state))
    if wants_json():
        click.echo(manifest_to_json(selected.manifest), nl=False)  # the bytes of the file
    else:
        click.echo(_summary(selected))


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
