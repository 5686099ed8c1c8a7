"""Build: from a checkout of this project to an image that has passed its proof.

The default route needs an engine only to build and to run. The engine builds the Dockerfile up to the stage without a
warm state, the bake runs in a container (with a GPU if requested), and its state becomes an additional layer. The image
gets its tag only after a container of it has shown zero cache misses. If its state was compiled for a GPU that the
engine does not have, nothing can be proven yet, and the labels of the image say so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.image.build_request import check_request, check_tag, unproven_name
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.engines.engine import ContainerRun, prove, run_build
from chatterbox_prewarm.image.labels import EVIDENCE
from chatterbox_prewarm.image.state_layers import change_for, pack_states
from chatterbox_prewarm.proof.checks import remove_older_evidence, require_passed
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.state.places import check_apart
from chatterbox_prewarm.state.provenance import ARGUMENTS, builder_args
from chatterbox_prewarm.state.selection import states_in
from chatterbox_prewarm.state.signature import default_signature
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.atomic_files import put_in_place, seal, staging_folder, write_whole
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.system.paths import WARM
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox_prewarm.image.build_request import BuildRequest
    from chatterbox_prewarm.image.engines.engine import Engine
    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image
    from chatterbox_prewarm.proof.checks import Evidence

logger = logging.getLogger(__name__)


def build(
    request: BuildRequest, engine: Engine, output: Path, *, say: Callable[[str], None] = logger.info
) -> tuple[tuple[Layer, ...], dict[Path, Evidence]]:
    """Build an image, prove it, and tag it.

    A failure or an interrupt leaves no container, volume or unfinished image. The state of a finished bake is kept.

    Args:
        request: the settings of the build.
        engine: the engine that builds.
        output: path for the evidence, which is written even if the proof fails; see `evidence_files`.
        say: is called with one line for each step.

    Returns:
        the layers of the warm states, and the evidence for each model by the path of its file; none if the proof needs
        a GPU that the engine does not have.

    Raises:
        IntegrityError: the stored state has the signature of another state.
        BadInputError, EngineError: the request is refused by `check_request`, or a step failed.
        NotWarmError: a container of the image had a cache miss. The image has no tag.
    """
    check_request(request, engine)
    check_apart({"--evidence": output, "--warm": request.warm})
    for path in evidence_files(output, request.variants):
        remove_older_evidence(path)
    with contextlib.ExitStack() as stack:

        def temporary(stage: str) -> str:
            """Return a name that is removed at the end, together with its image if that has no other name."""
            name = unproven_name(request.tag, stage)
            stack.callback(engine.untag, name)
            return name

        cold = temporary("cold")
        _build_stage(engine, request, "cold", cold, say)
        unproven = temporary("warm")
        layers, image = _add_states(request, engine, cold, unproven, temporary, say)
        if request.targets:
            check_tag(request, engine)
            engine.tag(unproven, request.tag)
            return layers, {}
        device = "cpu" if request.route == "no-gpu" else request.device
        proofs = {}
        for path, variant in evidence_files(output, request.variants).items():
            say(f"prove {f'the model {variant} of ' if variant else ''}the image, in a container")
            evidence = proofs[path] = prove(engine, unproven, device=device, variant=variant)
            write_whole(path, evidence.to_json())
            require_passed(evidence, path, rebake_hint=request.rebake_hint())
        labels = {EVIDENCE: ", ".join(f"sha256:{hash_file(path)}" for path in proofs)}
        proven = add_layers(image, [], Change(labels=labels), created=image.config["created"])
        name = temporary("proven")
        engine.load(unproven, [], proven, name)
        check_tag(request, engine)  # the build took minutes, and another process may have used the tag
        engine.tag(name, request.tag)
    return layers, proofs


def evidence_files(output: Path, variants: Sequence[str]) -> dict[Path, str | None]:
    """Return the path of the evidence for each model. With several models, each name gets its variant added."""
    if len(variants) < 2:
        return {output: None}
    return {output.with_name(f"{output.stem}.{variant}{output.suffix}"): variant for variant in variants}


def _add_states(
    request: BuildRequest,
    engine: Engine,
    cold: str,
    unproven: str,
    temporary: Callable[[str], str],
    say: Callable[[str], None],
) -> tuple[tuple[Layer, ...], Image]:
    """Add warm states to the cold image: the stored state if it has the same recipe and fits, or new ones."""
    warm = request.warm.absolute()
    warm.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(warm):
        # Whether a state for another GPU still fits the image cannot be checked here, so it is always baked.
        if request.may_reuse and _stored_recipe(warm) == request.recipe():
            say(f"the stored state {warm} has the same recipe")
            if default_signature(warm).is_file():
                State.read(warm).find_signature()  # a signed state that was changed is neither used nor replaced
            try:
                added = _load_states(request, engine, cold, unproven, [warm])
                _verify(engine, unproven, request)
            except (IntegrityError, FingerprintMismatchError) as error:
                say(f"the stored state cannot be used: {error.message}")
            else:
                say("the stored state fits the image: no bake is needed")
                return added
        stage = "bake" if request.route == "dockerfile" else "tools"
        image = temporary(stage)
        _build_stage(engine, request, stage, image, say)
        if stage == "tools":
            say("bake, in a container")
        with staging_folder(warm) as staging:
            _bake(request, engine, image, staging)
            baked = states_in(staging) or {warm.name: staging}
            if request.several_states:
                warm.mkdir(exist_ok=True)
                places = [warm / name for name in baked]
            else:
                places = [warm]
            for made, place in zip(baked.values(), places, strict=True):
                _keep(made, place)
        if not request.targets and not request.several_states:
            recipe = json.dumps(request.recipe(), indent=1, sort_keys=True) + "\n"
            _recipe_path(warm).write_text(recipe, encoding="utf-8")
    return _load_states(request, engine, cold, unproven, places)


def _keep(baked: Path, warm: Path) -> None:
    """Store a new state at its place."""
    State.open(baked)
    seal(baked)
    if (signature := default_signature(warm)).exists():
        signature.unlink()
        logger.warning("removed %s, the signature of the replaced state: sign the new one", signature)
    _recipe_path(warm).unlink(missing_ok=True)  # it belongs to the old state, which stays until here
    put_in_place(baked, warm)


def _bake(request: BuildRequest, engine: Engine, image: str, staging: Path) -> None:
    """Bake in a container, or copy the states out of the Dockerfile's bake stage. `staging` gets the states."""
    if request.route == "dockerfile":
        # The stage has no entrypoint, so a container of it needs some program to run.
        container = ContainerRun(image=image, command=["true"], isolated=False, export=(PurePosixPath(WARM), staging))
        engine.run(container)
        return
    clips = {name: PurePosixPath("/tmp") / f"{name}{clip.suffix}" for name, clip in request.voices.items()}  # noqa: S108
    voices = [word for name, path in clips.items() for word in ("--voice", f"{name}={path}")]
    container = ContainerRun(
        image=image,
        command=[*request.bake_command(), *voices],
        device=request.engine_device,
        isolated=False,
        files={path: request.voices[name] for name, path in clips.items()},
        environment={ARGUMENTS[name]: value for name, value in builder_args(request.arguments, os.environ).items()},
        export=(PurePosixPath(WARM), staging),
        follow=True,
    )
    engine.run(container)


def _load_states(
    request: BuildRequest, engine: Engine, cold: str, unproven: str, places: Sequence[Path]
) -> tuple[tuple[Layer, ...], Image]:
    """Load stored states on top of the cold image, as the image `unproven`."""
    base = engine.image(cold)
    with pack_states(places) as added:
        change = change_for(base, added, device=request.device)
        image = add_layers(base, added.layers, change, created=added.created)
        engine.load(cold, added.layers, image, unproven)
        return added.layers, image


def _verify(engine: Engine, image: str, request: BuildRequest) -> None:
    """Check that the state of an image fits the image and the engine's GPU.

    Raises:
        FingerprintMismatchError, IntegrityError: it does not.
    """
    device = request.bake_device
    engine.run(ContainerRun(image=image, command=["verify", "--device", device], device=device))


def _stored_recipe(warm: Path) -> object:
    """Read the recipe of the stored state, or return None if there is no state or its recipe is unknown."""
    if not (warm / MANIFEST_NAME).is_file():
        return None
    try:
        return json.loads(read_regular(_recipe_path(warm)))
    except (OSError, ValueError):
        return None


def _recipe_path(warm: Path) -> Path:
    # Not in the folder of the state, because the manifest must list every file there.
    return warm.with_name(f"{warm.name}.recipe.json")


def _build_stage(engine: Engine, request: BuildRequest, stage: str, tag: str, say: Callable[[str], None]) -> None:
    say(request.command_line(engine, stage, tag))
    run_build(engine, request.build_arguments(stage, tag), dockerfile=request.classic_dockerfile(stage))
