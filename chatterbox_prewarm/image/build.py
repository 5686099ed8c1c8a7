"""Build: from a checkout of this project to an image that has passed its proof.

The core route needs nothing of an engine but to build and to run: the Dockerfile is built up to what needs no warm
state, the bake runs in a container, with a GPU where one is asked for, and its state becomes one more layer. The image
gets its name only when a container of it has shown zero misses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.image.build_request import (
    Recipe,
    again,
    arguments_of,
    check,
    check_tag,
    dockerfile_of,
    in_words,
    unproven_name,
)
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.engines.engine import Run, prove, run_build
from chatterbox_prewarm.image.labels import EVIDENCE
from chatterbox_prewarm.image.state_layers import change_for, gather
from chatterbox_prewarm.proof.checks import require_passed
from chatterbox_prewarm.state.manifest import MANIFEST_NAME, check_layout, read_manifest
from chatterbox_prewarm.state.provenance import ARGUMENTS, told
from chatterbox_prewarm.state.signing import check_signed, default_signature
from chatterbox_prewarm.system.atomic_files import put_in_place, seal, staging_folder, write_whole
from chatterbox_prewarm.system.locks import exclusive_lock
from chatterbox_prewarm.system.paths import WARM

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatterbox_prewarm.image.build_request import Request
    from chatterbox_prewarm.image.engines.engine import Engine
    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image
    from chatterbox_prewarm.proof.checks import Evidence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build made: the layer of its warm state, and the proof."""

    layer: Layer
    evidence: Evidence


def build(request: Request, engine: Engine, written: Path, *, say: Callable[[str], None] = logger.info) -> Built:
    """Build an image, prove it, and give it its name.

    Whatever ends it, no container, no volume and no half-made image stays; the state of a bake that was finished does.

    Args:
        request: what to build.
        engine: to build with.
        written: where the evidence of the proof goes, passed or not.
        say: called with one line for each step.

    Raises:
        IntegrityError: the state that is kept has the signature of another one beside it.
        BadInputError, EngineError: as `check`; or a step failed.
        NotWarmError: a container of the image missed; nothing was tagged.
    """
    check(request, engine)
    written.unlink(missing_ok=True)  # an older proof must not stand for this one
    with contextlib.ExitStack() as stack:

        def temporary(stage: str) -> str:
            """A name that goes at the end, with the image if it has no other."""
            name = unproven_name(request.tag, stage)
            stack.callback(engine.forget, name)
            return name

        cold = temporary("cold")
        _build(engine, request, "cold", cold, say)
        unproven = temporary("warm")
        layer, image = _with_state(request, engine, cold, unproven, temporary, say)
        say("prove, in a container of it")
        evidence = prove(engine, unproven, device="cpu" if request.route == "no-gpu" else request.device)
        document = evidence.to_json()
        write_whole(written, document)
        require_passed(evidence, written, again=again(request))
        labels = {EVIDENCE: f"sha256:{hashlib.sha256(document.encode()).hexdigest()}"}
        proven = add_layers(image, [], Change(labels=labels), created=image.config["created"])
        engine.load(unproven, [], proven, temporary("proven"))
        check_tag(request, engine)  # minutes have passed, and somebody may have taken the name
        engine.tag(unproven_name(request.tag, "proven"), request.tag)
    return Built(layer=layer, evidence=evidence)


def _with_state(
    request: Request,
    engine: Engine,
    cold: str,
    unproven: str,
    temporary: Callable[[str], str],
    say: Callable[[str], None],
) -> tuple[Layer, Image]:
    """Put a warm state on top of the cold image: the one that is kept, or a new one."""
    warm = request.warm.absolute()
    warm.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(warm):
        if not request.rebake and _made_by(warm) == request.recipe():
            say(f"the state of {warm} was made by this recipe")
            if (signature := default_signature(warm)).is_file():
                check_signed(warm, signature)  # what is signed is somebody's: neither shipped nor baked over unasked
            try:
                appended = _append_here(request, engine, cold, unproven)
                _verify(engine, unproven, request)
            except (IntegrityError, FingerprintMismatchError) as error:
                say(f"it is of no use here: {error.message}")
            else:
                say("it fits the image: nothing is baked")
                return appended
        stage = "bake" if request.route == "dockerfile" else "tools"
        image = temporary(stage)
        _build(engine, request, stage, image, say)
        if stage == "tools":
            say("bake, in a container")
        with staging_folder(warm) as staging:
            _recipe_file(warm).unlink(missing_ok=True)
            made = _baked(request, engine, image, staging)
            manifest = read_manifest(made)
            check_layout(manifest, made)
            seal(made)
            _forget_signature(warm, say)
            put_in_place(made, warm)
        text = json.dumps(asdict(request.recipe()), indent=1, sort_keys=True) + "\n"
        _recipe_file(warm).write_text(text, encoding="utf-8")
    return _append_here(request, engine, cold, unproven)


def _forget_signature(warm: Path, say: Callable[[str], None]) -> None:
    """Remove the signature of the state that is replaced: it must not go along with the new one."""
    if (signature := default_signature(warm)).exists():
        signature.unlink()
        say(f"{signature} was of the state before this one, and is removed: sign the new one")


def _baked(request: Request, engine: Engine, image: str, staging: Path) -> Path:
    """Bake in a container, or take what the Dockerfile baked; the state as a folder in, or at, `staging`."""
    if request.route == "dockerfile":
        # The stage has no entrypoint, and nothing to run.
        engine.run(Run(image=image, command=["true"], isolated=False, export=(PurePosixPath(WARM), staging)))
        return next(path for path in staging.iterdir() if path.name[0] != ".")
    recipe = request.recipe()
    places = {name: PurePosixPath("/tmp") / f"{name}{clip.suffix}" for name, clip in request.voices.items()}  # noqa: S108
    command = ["bake", *recipe.arguments()]
    for name, place in places.items():
        command += ["--voice", f"{name}={place}"]
    container = Run(
        image=image,
        command=command,
        device=recipe.device,
        isolated=False,
        files={place: request.voices[name] for name, place in places.items()},
        environment={ARGUMENTS[name]: value for name, value in told(request.arguments, os.environ).items()},
        export=(PurePosixPath(WARM), staging),
        follow=True,
    )
    engine.run(container)
    return staging


def _append_here(request: Request, engine: Engine, cold: str, unproven: str) -> tuple[Layer, Image]:
    """Load the state that is kept on top of the cold image."""
    base = engine.image(cold)
    with gather([request.warm]) as addition:
        change = change_for(base, addition, device=request.device)
        image = add_layers(base, addition.layers, change, created=addition.created)
        engine.load(cold, addition.layers, image, unproven)
        return addition.layers[0], image


def _verify(engine: Engine, image: str, request: Request) -> None:
    """Whether the state of an image fits it, and the engine's GPU.

    Raises:
        FingerprintMismatchError, IntegrityError: it does not.
    """
    device = request.recipe().device
    engine.run(Run(image=image, command=["verify", "--device", device], device=device))


def _made_by(warm: Path) -> Recipe | None:
    """The recipe of the state that is kept there, if it is known."""
    if not (warm / MANIFEST_NAME).is_file():
        return None
    try:
        return Recipe(**json.loads(_recipe_file(warm).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _recipe_file(warm: Path) -> Path:
    """Beside the state, which holds nothing that its manifest does not list."""
    return warm.with_name(f"{warm.name}.recipe.json")


def _build(engine: Engine, request: Request, stage: str, tag: str, say: Callable[[str], None]) -> None:
    say(in_words(request, engine, stage, tag))
    run_build(engine, arguments_of(request, stage, tag), dockerfile=dockerfile_of(request, stage))
