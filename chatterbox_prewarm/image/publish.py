"""Publish: bake, prove and append in one container, on a node that has the GPU and no engine, as in a Kubernetes Job.

The order makes it safe to try again: nothing is named in the registry before the proof has passed, and the tag comes
last, when the evidence is attached already. Several that gather states in one image at a time each begin again when the
tag has moved under them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.errors import BadInputError, EngineError, FingerprintMismatchError
from chatterbox_prewarm.image.append import TagMovedError, append, check_tag
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.labels import STATES, label_of, read_states
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.state_layers import gather
from chatterbox_prewarm.image.stores import reading, storing
from chatterbox_prewarm.model.profiles import default_execution
from chatterbox_prewarm.proof.checks import require_passed
from chatterbox_prewarm.proof.prove import prove, prove_here
from chatterbox_prewarm.system.atomic_files import write_whole
from chatterbox_prewarm.system.fingerprint import read_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.image.append import Appended
    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.image.matrix import Bake
    from chatterbox_prewarm.image.oci import Readable
    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.state_layers import Addition

logger = logging.getLogger(__name__)

#: More than bakes that end within the seconds that an append takes.
_ATTEMPTS = 10
#: Seconds after which a tag is seen that another set at the same moment: a registry compares nothing as it sets one.
_SETTLED = 2.0


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a container has the checkpoint, makes the state, and keeps caches; where evidence goes, passed or not."""

    weights: Path
    warm: Path
    cache: Path
    evidence: Path


def publish(
    wanted: Bake,
    base: str,
    target: str,
    places: Places,
    *,
    insecure: bool | None = None,
    say: Callable[[str], None] = logger.info,
) -> Appended | None:
    """Bake here, prove it, add it to an image, and attach the evidence.

    The image is `target` if it is there, so that the states of several GPU types gather in it one after another, and
    `base` for the first one.

    Args:
        wanted: what to bake; the GPU must be this node's.
        base: the image without a state that this process runs in, but for its compilers.
        target: the image that it becomes.
        places: in this container.
        insecure: of the registries, as `Repository` has it.
        say: called with one line for each step.

    Returns:
        what was sent, or None if the image had the state already.

    Raises:
        FingerprintMismatchError: this node has another GPU.
        BadInputError: the image has another state for this machine and software.
        NotWarmError: a fresh process missed; nothing was sent.
        PrewarmError: as `bake`, `prove_here` and `append`.
    """
    below, result = parse(base), parse(target)
    if result.digest:
        raise BadInputError(f"{target} names a digest, not a tag", next_step="name the tag that the image is to get")
    found = read_fingerprint(wanted.device).gpu
    if wanted.gpu and found != wanted.gpu:
        raise FingerprintMismatchError(
            f"this node has the GPU {found!r}, and the bake is for {wanted.gpu!r}",
            next_step="run it on such a node: nodeSelector nvidia.com/gpu.product",
        )
    _check_images(below, result, insecure=insecure)
    places.evidence.unlink(missing_ok=True)  # an older proof must not stand for this one
    say(f"bake: {wanted.variant}, {wanted.gpu or 'CPU'}, {wanted.profile}")
    bake(
        places.weights,
        places.warm,
        cache=places.cache,
        device=wanted.device,
        execution=default_execution(wanted.device, profile=wanted.profile, t3_dtype=wanted.t3_dtype),
        levels=[int(level) for level in wanted.levels.split(",")],
        voices=wanted.voices,
        progress=say,
    )
    say("prove, in a fresh process")
    try:
        evidence = prove(places.warm, places.weights)
    except EngineError as error:  # a pod may not make namespaces
        say(f"{error.message}; the process is not set apart, and its counters count all the same")
        evidence = prove_here(places.warm, places.weights, places.cache, apart=False)
    write_whole(places.evidence, evidence.to_json())
    require_passed(evidence, places.evidence)
    with gather([places.warm]) as addition:
        made = _add(below, result, addition, places.evidence, insecure=insecure, say=say)
    if made is None:
        say(f"{target} has this state already, from an earlier attempt: nothing is sent")
    return made


def _check_images(base: ImageReference, target: ImageReference, *, insecure: bool | None) -> None:
    """Make sure that the base can be read and the target's tag be taken, before minutes of baking."""
    with reading(base, insecure=insecure) as (source, name):
        resolve(source, name)
    with storing(target, insecure=insecure) as (store, tag):
        check_tag(store, tag, replacing=True)


def _add(
    base: ImageReference,
    target: ImageReference,
    addition: Addition,
    evidence: Path,
    *,
    insecure: bool | None,
    say: Callable[[str], None],
) -> Appended | None:
    """Add a state to the image that has the tag by now, or to the base; None if it is in there.

    Raises:
        BadInputError: the image has another state for the same machine and software.
    """
    (ours,) = map(label_of, addition.manifests)
    made: Appended | None = None
    for _ in range(_ATTEMPTS):
        with storing(target, insecure=insecure) as (store, tag):
            before = store.read_manifest(tag).digest if store.has_manifest(tag) else ""
            theirs = _held(store, before, ours.key) if before else None
        if theirs is not None:
            _check_same(ours, theirs, target)
            return made
        below = target.at(before) if before else base
        try:
            made = append(below, target, addition, expected=before, evidence=evidence, insecure=insecure, say=say)
        except TagMovedError as error:
            say(f"{error.message}; once more")
        time.sleep(_SETTLED)
    raise EngineError(f"the tag of {target} moves all the time", next_step="let fewer bakes add to it at once")


def _held(store: Readable, digest: str, key: str) -> StateLabel | None:
    """The state of an image that has this key, if one has."""
    labels = resolve(store, digest).labels
    states = read_states(labels) if STATES in labels else ()
    return next((state for state in states if state.key == key), None)


def _check_same(ours: StateLabel, theirs: StateLabel, target: ImageReference) -> None:
    """Refuse to take another state for the one that was baked here: a key tells nothing of weights and voices.

    Raises:
        BadInputError: it is another one.
    """
    same = ours.made_of == theirs.made_of if theirs.made_of else ours.set_digest == theirs.set_digest
    if not same:
        raise BadInputError(
            f"{target} has another state for this machine and software, {ours.key}: it was baked from other weights, "
            f"voices or levels on {theirs.created}, and has the set digest {theirs.set_digest}, not {ours.set_digest}",
            next_step="name a new target in the matrix, or remove that tag so that its image is made anew",
        )
