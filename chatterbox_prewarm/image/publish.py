"""Publish: bake, prove and append in one container on a node with the GPU, without an engine, e.g. in a Kubernetes Job.

Retries are safe: nothing is sent to the registry before the proof passes, and the tag is set last, after the evidence
is attached. Several publishers can add states to one image at the same time: each retries if the tag has moved.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.errors import BadInputError, EngineError, FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.image.append import AppendOptions, AppendResult, TagMovedError, append, check_tag
from chatterbox_prewarm.image.attest import attach_evidence, check_pinned, read_subject
from chatterbox_prewarm.image.compose import resolve
from chatterbox_prewarm.image.labels import STATES, read_states, state_label
from chatterbox_prewarm.image.node_fit import image_setting
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.state_layers import pack_states
from chatterbox_prewarm.image.stores import open_store
from chatterbox_prewarm.model.profiles import default_execution
from chatterbox_prewarm.proof.checks import default_evidence, remove_older_evidence, require_passed
from chatterbox_prewarm.proof.prove import ProofOptions, prove, prove_here
from chatterbox_prewarm.state.selection import checkpoints_for, states_in
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.atomic_files import scratch_folder, write_whole
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.weights.checkpoints import choose_checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    from chatterbox_prewarm.image.labels import StateLabel
    from chatterbox_prewarm.image.matrix import Bake
    from chatterbox_prewarm.image.oci import Image, Store
    from chatterbox_prewarm.image.references import ImageReference
    from chatterbox_prewarm.image.state_layers import StateLayers
    from chatterbox_prewarm.proof.checks import Evidence

logger = logging.getLogger(__name__)

#: Maximum number of attempts to set the tag. It is larger than the number of bakes that end while one append runs.
_ATTEMPTS = 10
#: Seconds to wait before the check whether another publisher has replaced the tag. Registries have no compare-and-set.
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """Options of `publish`.

    Attributes:
        weights: directory of the checkpoint, or of several, of which the one of the bake's variant is used.
        warm: directory that the state is written to. The evidence is written next to it, also if the proof fails.
        cache: the cache directory.
        key: private key that signs the statements about the proof; see `attach_evidence`.
        insecure: HTTP or HTTPS for the registries, as in `Repository`.
        say: called with one line of progress for each step.
    """

    weights: Path
    warm: Path
    cache: Path
    key: EllipticCurvePrivateKey | None = None
    insecure: bool | None = None
    say: Callable[[str], None] = logger.info


def publish(planned: Bake, base: str, target: str, options: PublishOptions) -> AppendResult:
    """Bake on this node, prove the state, add it to an image, and attach the evidence.

    The state is added to `target` if that exists, and to `base` otherwise. So the states of several GPU types
    accumulate in one image.

    Args:
        planned: the bake; its GPU must be this node's.
        base: the image without states. This process runs in the same image plus compilers (stage `tools`).
        target: tag of the resulting image, in a registry or a layout.
        options: see `PublishOptions`.

    Returns:
        the image with the number of blobs and bytes that were sent; both are 0 if the image had the state already.

    Raises:
        FingerprintMismatchError: this node has another GPU.
        BadInputError: `target` is not a tag that can be set, or its image has another state for this machine and
            software.
        NotWarmError: the fresh process had cache misses; nothing was sent.
        PrewarmError: see `bake`, `prove_here` and `append`.
    """
    base_reference, target_reference = parse(base), parse(target)
    if target_reference.digest or target_reference.kind == "docker-archive":
        raise BadInputError(
            f"{target} is not a tag that states can be added to",
            next_step="name a tag in a registry, or in a layout as oci:PATH:TAG",
        )
    gpu = read_fingerprint(planned.device).gpu
    if planned.gpu and gpu != planned.gpu:
        raise FingerprintMismatchError(
            f"this node has the GPU {gpu!r}, and the bake is for {planned.gpu!r}",
            next_step="run it on a node with that GPU: nodeSelector nvidia.com/gpu.product",
        )
    _check_images(base_reference, target_reference, insecure=options.insecure)
    evidence = _bake_and_prove(planned, options)
    append_options = AppendOptions(evidence=evidence, key=options.key, insecure=options.insecure, say=options.say)
    with pack_states([options.warm]) as states:
        return add_to_image(base_reference, target_reference, states, append_options)


def _bake_and_prove(planned: Bake, options: PublishOptions) -> Path:
    """Bake a state and prove it; return the path of the evidence."""
    say = options.say
    path = default_evidence(options.warm)
    remove_older_evidence(path)
    say(f"bake: {planned.variant}, {planned.gpu or 'CPU'}, {planned.profile}")
    weights = choose_checkpoints(options.weights, [planned.variant])[planned.variant]
    bake_options = BakeOptions(
        weights=weights,
        warm=options.warm,
        cache=options.cache,
        device=planned.device,
        execution=default_execution(planned.device, profile=planned.profile, t3_dtype=planned.t3_dtype),
        levels=tuple(int(level) for level in planned.levels.split(",")),
        voices=planned.voices,
    )
    bake(bake_options, progress=say)
    evidence = _prove(ProofOptions(warm=options.warm, weights=weights), options)
    write_whole(path, evidence.to_json())
    require_passed(evidence, path)
    return path


def prove_image(image: str, options: PublishOptions, *, name: str | None = None) -> list[str]:
    """Prove a state of an image on this node, and attach the evidence to the image. The image does not change.

    Args:
        image: the image in a registry or a layout. This process runs in a container of it.
        options: see `PublishOptions`; `warm` is the folder of the image's states.
        name: the state to prove; by default the ones that a start would use here, one for each model.

    Returns:
        the digest of the manifest with the evidence, for each state.

    Raises:
        BadInputError: an archive cannot have evidence, or there is a key and `image` is not named by its digest.
        IntegrityError: the image has other states.
        NotWarmError: a proof did not pass; nothing was sent for it.
        PrewarmError: see `prove_here` and `attach_evidence`.
    """
    reference = parse(image)
    if reference.kind == "docker-archive":
        raise BadInputError(f"{image} is an archive, which cannot have evidence", next_step="name it in a registry")
    with open_store(reference, insecure=options.insecure) as (store, target):
        subject, found = read_subject(store, target)
        if options.key is not None:
            check_pinned(target, subject.digest)
    _check_has_states(image, found, options.warm)
    device = image_setting(found, "DEVICE")
    attached = []
    for weights in checkpoints_for(options.weights, options.warm, name).values():
        proof = ProofOptions(warm=options.warm, weights=weights, device=device, name=name)
        evidence = _prove(proof, options)
        for check in evidence.checks:
            options.say(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.seen}")
        require_passed(evidence, "the lines above")
        with scratch_folder("chatterbox-prewarm-evidence-") as scratch:
            path = scratch / "evidence.json"
            write_whole(path, evidence.to_json())
            with open_store(reference, insecure=options.insecure) as (store, _):
                attached.append(attach_evidence(store, subject.digest, path, key=options.key))
    return attached


def _check_has_states(image: str, found: Image, warm: Path) -> None:
    """Check that an image has a state of a folder, before minutes of proving.

    Raises:
        IntegrityError: it has no such state.
    """
    labelled = {state.set_digest for state in read_states(found.labels)}
    here = {State.read(path).manifest.set_digest for path in states_in(warm).values()}
    if not labelled & here:
        raise IntegrityError(
            f"{image} does not have any state of {warm}", next_step="run this in a container of that image"
        )


def _prove(proof: ProofOptions, options: PublishOptions) -> Evidence:
    options.say("prove in a fresh process")
    try:
        return prove(proof)
    except EngineError as error:  # pods usually cannot create namespaces
        options.say(f"{error.message}; the process runs without isolation, and its counters still count")
        return prove_here(proof, options.cache, isolated=False)


def _check_images(base: ImageReference, target: ImageReference, *, insecure: bool | None) -> None:
    """Check that the base can be read and the target's tag can be set, before minutes of baking."""
    with open_store(base, insecure=insecure) as (source, name):
        resolve(source, name)
    with open_store(target, insecure=insecure) as (store, tag):
        check_tag(store, tag, replacing=True)


def add_to_image(
    base: ImageReference, target: ImageReference, states: StateLayers, options: AppendOptions
) -> AppendResult:
    """Add a state to the image that has the tag now, or to the base if no image has it.

    Returns:
        the image with the number of blobs and bytes that were sent; both are 0 if the image had the state already.

    Raises:
        BadInputError: the image has another state for the same machine and software.
        EngineError: other publishers moved the tag on every attempt.
    """
    (state,) = map(state_label, states.manifests)
    result: AppendResult | None = None
    for _ in range(_ATTEMPTS):
        with open_store(target, insecure=options.insecure) as (store, tag):
            document = store.read_manifest(tag) if store.has_manifest(tag) else None
            existing = _find_state(store, document.digest, state.key) if document else None
        if document and existing:
            _check_same(state, existing, target)
            if result is None:
                options.say(f"{target} has this state already, from an earlier attempt: nothing is sent")
            return result or AppendResult(document=document, blobs_sent=0, bytes_sent=0)
        digest = document.digest if document else ""
        try:
            current = target.at(digest) if digest else base
            result = append(current, target, states, replace(options, expected=digest))
        except TagMovedError as error:
            options.say(f"{error.message}; trying again")
        time.sleep(_SETTLE_SECONDS)
    raise EngineError(
        f"other publishers moved the tag of {target} {_ATTEMPTS} times", next_step="run fewer publishers at once"
    )


def _find_state(store: Store, digest: str, key: str) -> StateLabel | None:
    """Return the state of an image with this key, or None."""
    labels = resolve(store, digest).labels
    states = read_states(labels) if STATES in labels else ()
    return next((state for state in states if state.key == key), None)


def _check_same(state: StateLabel, existing: StateLabel, target: ImageReference) -> None:
    """Check that two states with the same key have the same weights, voices and levels, which the key does not cover.

    Raises:
        BadInputError: they differ.
    """
    if existing.inputs_digest:
        same = state.inputs_digest == existing.inputs_digest
    else:
        same = state.set_digest == existing.set_digest
    if not same:
        raise BadInputError(
            f"{target} has another state for this machine and software, {state.key}: it was baked from other weights, "
            f"voices or levels on {existing.created}, and has the set digest {existing.set_digest}, "
            f"not {state.set_digest}",
            next_step="name a new target in the matrix, or remove that tag so that its image is created again",
        )
