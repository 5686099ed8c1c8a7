"""bake, inspect, verify, prove: what is done with a warm state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    PATH,
    cache_option,
    check_place,
    device_option,
    insecure_option,
    option,
    parse_voice,
    profile_option,
    start_device_option,
    state_option,
    trust_options,
    warm_option,
    weights_option,
)
from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.image.engines.engine import ENGINES
from chatterbox_prewarm.model.profiles import T3_DTYPES, default_execution
from chatterbox_prewarm.system.atomic_files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.proof.checks import Evidence


@click.command()
@weights_option
@warm_option
@cache_option
@device_option
@profile_option("aot")
@option("--t3-dtype", default="float32", type=click.Choice(T3_DTYPES), help="What T3's transformer computes in.")
@click.option("--graphs/--no-graphs", default=None, help="T3's step as a CUDA graph; on a GPU it is by default.")
@option("--levels", default="1,2,3", help="Which warm-up levels to run, separated by commas.")
@click.option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Bake a voice from a clip; repeatable.")
@click.option("--without", multiple=True, metavar="FAMILY", help="Leave a cache family out; repeatable.")
def bake(
    *,
    weights: Path,
    warm: Path,
    cache: Path,
    device: str,
    profile: str | None,
    t3_dtype: str,
    graphs: bool | None,
    levels: str,
    voices: tuple[str, ...],
    without: tuple[str, ...],
) -> None:
    """Warm the model up on this machine and write the warm state."""
    from chatterbox_prewarm.bake import bake as baking
    from chatterbox_prewarm.families.registry import FAMILIES

    if unknown := sorted(set(without) - set(FAMILIES)):
        raise BadInputError(f"there is no cache family {unknown[0]!r}", next_step=f"choose from: {', '.join(FAMILIES)}")
    manifest = baking.bake(
        weights,
        warm,
        cache=cache,
        device=device,
        execution=default_execution(device, profile=profile, t3_dtype=t3_dtype, graphs=graphs),
        levels=_parse_levels(levels),
        voices=dict(parse_voice(voice) for voice in voices),
        families=[name for name in FAMILIES if name not in without],
        progress=lambda line: click.echo(f"bake: {line}", err=True),
    )
    click.echo(_family_table(manifest))


@click.command()
@warm_option
@state_option
@click.option("--output", type=PATH, required=True, help="Where the layer goes, a .tar.gz file.")
def pack(*, warm: Path, state: str | None, output: Path) -> None:
    """Pack a warm state as a deterministic image layer: the same state gives the same bytes.

    It unpacks to a folder of its own, named by the state's key, beside which others can lie.
    """
    from chatterbox_prewarm.image.layer import pack as pack_layer
    from chatterbox_prewarm.state.folder import named

    path = named(warm, state)
    layer = pack_layer(path, output)
    click.echo(f"{output}: {layer.size / 1e6:.1f} MB, digest sha256:{layer.digest}, diff id sha256:{layer.diff_id}")


@click.command()
@warm_option
@state_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself.")
@click.option("--diff", nargs=2, type=PATH, metavar="A B", help="Say how the state B differs from the state A.")
def inspect(*, warm: Path, state: str | None, as_json: bool, diff: tuple[Path, Path] | None) -> None:
    """Show what a warm state holds and what it was made for, or list the states of a folder.

    With --diff nothing else is looked at, and the exit code is 0 whether they differ or not.
    """
    from chatterbox_prewarm.state.folder import key_of, named, states_in
    from chatterbox_prewarm.state.manifest import manifest_digest, manifest_to_json, read_manifest

    if diff is not None:
        from chatterbox_prewarm.state.state_diff import differences

        one, other = (read_manifest(named(path, None)) for path in diff)
        click.echo("\n".join(differences(one, other)) or "no difference")
        return
    found = states_in(warm)
    if state is None and len(found) > 1 and not as_json:
        for name, path in found.items():
            click.echo(_state_line(name, path))
        return
    path = named(warm, state)
    manifest = read_manifest(path)
    if as_json:
        click.echo(manifest_to_json(manifest), nl=False)
        return
    click.echo(f"warm state {manifest.set_digest}")
    click.echo(f"  key {key_of(manifest)}")
    click.echo(f"  manifest sha256:{manifest_digest(path)}, what --expect-digest takes")
    click.echo(
        f"  made by {manifest.tool} on {manifest.created}, levels {', '.join(map(str, manifest.levels)) or 'none'}"
    )
    execution = manifest.execution
    graphs = "with" if execution.graphs else "without"
    click.echo(f"  {manifest.variant}, voices: {', '.join(manifest.voices)}")
    click.echo(f"  profile {execution.profile}, T3 in {execution.t3_dtype}, {graphs} CUDA graphs")
    click.echo(f"  weights {manifest.weights.repository} at {manifest.weights.revision}")
    made = manifest.provenance
    click.echo(f"  sources {made.source} at revision {made.revision}, base image {made.base_image}")
    click.echo(f"  packages {made.packages}, builder {made.builder}")
    took = manifest.measured
    click.echo(
        f"  the bake's own starts: {took.ready_seconds:.1f} s to ready, {took.cold_seconds:.1f} s cold to attached; "
        f"at most {took.resident_bytes / 1e6:.0f} MB resident, {took.device_bytes / 1e6:.0f} MB of the GPU's"
    )
    for name in ("arch", "cpu_model", "gpu", "compute_capability", "driver", "python", "torch", "numba"):
        click.echo(f"  {name}: {manifest.fingerprint.get(name, 'not recorded')}")
    click.echo(_family_table(manifest))


@click.command()
@warm_option
@state_option
@start_device_option
@weights_option
@cache_option
@trust_options
@click.option("--image", metavar="IMAGE", help="Judge an image by its labels alone; nothing of it is pulled.")
@click.option("--host-facts", type=PATH, help="With --image: the node, as `facts` wrote it; this one by default.")
@insecure_option
def verify(
    *, image: str | None, host_facts: Path | None, insecure: bool | None, device: str | None, **places: Any
) -> None:
    """Check every digest of a warm state, and whether each family fits this machine; explains each difference.

    Of a folder of several states it checks the one that a start here would take, and says why not the others. With
    --key or --expect-digest, first that it is the state that you trust; of an image's labels that cannot be told.
    """
    if image is not None:
        _refuse_trust(places)
        _verify_image(image, host_facts, device, insecure=insecure)
    elif host_facts is not None:
        raise BadInputError("--host-facts is for an image", next_step="add --image IMAGE")
    else:
        _verify_here(device=device, **places)


def _refuse_trust(places: Mapping[str, Any]) -> None:
    """Labels are not signed: whoever asks for a key is not to take their verdict for that of the key.

    Raises:
        BadInputError: trust was asked for, on the command line or by a variable of the environment.
    """
    for name in ("key", "signature", "expect_digest"):
        if places[name] is not None:
            given = f"--{name.replace('_', '-')}"
            raise BadInputError(
                f"{given} is checked against a state's manifest, and --image reads the labels of an image alone",
                next_step=f"leave {given} out, or unset CHATTERBOX_PREWARM_{name.upper()}; a start of the image checks "
                "it, and so does `verify` in a container of it",
            )


def _verify_image(image: str, host_facts: Path | None, device: str | None, *, insecure: bool | None) -> None:
    from chatterbox_prewarm.commands.nodes import report_verdict
    from chatterbox_prewarm.image.node_fit import judge_reference
    from chatterbox_prewarm.image.references import parse
    from chatterbox_prewarm.image.stores import reading
    from chatterbox_prewarm.state import node_facts as hosts

    host = hosts.read_host_facts(host_facts) if host_facts else hosts.host_facts(device)
    with reading(parse(image), insecure=insecure) as (store, name):
        report_verdict(judge_reference(store, name, host))


def _verify_here(
    *,
    warm: Path,
    state: str | None,
    device: str | None,
    weights: Path,
    cache: Path,
    key: Path | None,
    signature: Path | None,
    expect_digest: str | None,
) -> None:
    from chatterbox_prewarm.state.compatibility import facts
    from chatterbox_prewarm.state.selection import choose
    from chatterbox_prewarm.state.verify import verify as verify_state

    choice = choose(
        warm,
        lambda manifest: facts(weights, cache, device or manifest.reference.device),
        device=device,
        name=state,
        strict=True,
    )
    lines = verify_state(choice.path, weights, cache, key=key, signature=signature, expected_digest=expect_digest)
    for line in (*choice.remarks, *lines):
        click.echo(line)


@click.command()
@warm_option
@state_option
@start_device_option
@weights_option
@cache_option
@click.option("--evidence", type=PATH, help="Write the evidence to this JSON file, or to standard output (-).")
@click.option("--here", is_flag=True, help="This process is set apart already, as in a container: make no namespaces.")
@click.option("--image", help="Prove in a container of this image, run as it is meant to be.")
@option("--engine", default="docker", type=click.Choice(ENGINES), help="That has the image.")
def prove(
    *,
    warm: Path,
    state: str | None,
    device: str | None,
    weights: Path,
    cache: Path,
    evidence: Path | None,
    here: bool,
    image: str | None,
    engine: str,
) -> None:
    """Show that a fresh, isolated process hits every cache and misses none. Exit code 13 when it does not.

    Of a folder of several states it proves the one that a start here would take. With --image the places, and the
    states, are the image's own. --cache counts with --here alone: otherwise the cache is a new folder.
    """
    from chatterbox_prewarm.proof import prove as proving
    from chatterbox_prewarm.proof.checks import require_passed

    if evidence is not None and str(evidence) != "-":
        check_place(evidence)
        evidence.unlink(missing_ok=True)  # an older proof must not stand for this one
    if image:
        from chatterbox_prewarm.image.engines.connect import prove_image

        found = prove_image(image, engine=engine)
    elif here:
        found = proving.prove_here(warm, weights, cache, device=device, state=state)
    else:
        found = proving.prove(warm, weights, device=device, state=state)
    _write_evidence(found, evidence)
    for check in found.checks:
        click.echo(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}", err=str(evidence) == "-")
    require_passed(found, "standard output" if str(evidence) == "-" else evidence or "")


def _state_line(name: str, path: Path) -> str:
    """A state of several in one line."""
    from chatterbox_prewarm.state.folder import key_of
    from chatterbox_prewarm.state.manifest import read_manifest

    try:
        manifest = read_manifest(path)
    except IntegrityError as error:
        return f"{name}: cannot be used: {error.message}"
    size = sum(family.size for family in manifest.families)
    return f"{name}: {key_of(manifest)}, {size:,} bytes, set digest {manifest.set_digest}"


def _parse_levels(levels: str) -> tuple[int, ...]:
    try:
        return tuple(int(level) for level in levels.split(","))
    except ValueError:
        raise BadInputError(f"{levels!r} is no list of warm-up levels", next_step="use --levels 1,2,3") from None


def _family_table(manifest: Any) -> str:
    lines = [f"  {'family':<14}{'files':>6}{'bytes':>14}{'spent s':>10}{'saved s':>10}"]
    for family in manifest.families:
        # What a node that pulls 100 MB/s waits for the family's bytes.
        remark = "  saves less than it costs" if family.seconds_saved < family.size / 100e6 else ""
        lines.append(
            f"  {family.name:<14}{len(family.files):>6}{family.size:>14,}{family.seconds_spent:>10.2f}"
            f"{family.seconds_saved:>10.2f}{remark}"
        )
    return "\n".join(lines)


def _write_evidence(found: Evidence, path: Path | None) -> None:
    if str(path) == "-":
        click.echo(found.to_json(), nl=False)
    elif path is not None:
        write_whole(path, found.to_json())
