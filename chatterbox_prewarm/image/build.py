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
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_prewarm import manifest as manifests
from chatterbox_prewarm.errors import BadInputError, EngineError, FingerprintMismatchError, IntegrityError
from chatterbox_prewarm.image.addition import change_for, gather
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.engine import Run, prove, run_build
from chatterbox_prewarm.image.labels import labels_of
from chatterbox_prewarm.places import WARM
from chatterbox_prewarm.provenance import VARIABLES
from chatterbox_prewarm.prove import require_passed
from chatterbox_prewarm.staging import exclusive, put_in_place, seal, staging_folder
from chatterbox_prewarm.text import check_voice_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatterbox_prewarm.image.engine import Engine
    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.image.oci import Image
    from chatterbox_prewarm.prove import Evidence

logger = logging.getLogger(__name__)

#: Bytes that a build needs where the engine keeps its images: the packages twice, the weights, and room to work.
_ROOM = 20_000_000_000
EVIDENCE = "io.chatterbox-prewarm.evidence"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bake is asked for; a state that is kept is used again by the same recipe alone.

    `voices` are names and digests of reference clips.
    """

    device: str
    profile: str
    t3_dtype: str
    levels: str
    voices: Mapping[str, str]

    def arguments(self) -> list[str]:
        """Of `bake`, but for the voices."""
        return [
            *("--device", self.device, "--profile", self.profile),
            *("--t3-dtype", self.t3_dtype, "--levels", self.levels),
        ]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A build: what it starts from and what it is to make.

    Attributes:
        checkout: of this project, with its Dockerfile.
        tag: the image's name.
        warm: where the warm state is kept for the next build.
        device: that the image is for, as torch names it.
        route: how the bake gets at the device.
        profile: how the model executes; the recipe's is `eager` where the device is absent.
        t3_dtype: of T3's transformer.
        levels: of the warm-up, separated by commas.
        voices: names and reference clips to bake.
        arguments: build arguments of the Dockerfile.
        secrets: as `docker build --secret` has them.
        network: as `docker build --network` has it.
        replacing: take the name from an image that has it.
    """

    checkout: Path
    tag: str
    warm: Path
    device: str
    route: str
    profile: str
    t3_dtype: str
    levels: str
    voices: Mapping[str, Path]
    arguments: Mapping[str, str]
    secrets: tuple[str, ...]
    network: str
    replacing: bool

    def recipe(self) -> Recipe:
        """What the bake is asked for; without the GPU that the image is for, only what depends on none."""
        without = self.route == "no-gpu"
        return Recipe(
            device="cpu" if without else self.device,
            profile="eager" if without else self.profile,
            t3_dtype=self.t3_dtype,
            levels=self.levels,
            voices={name: manifests.hash_file(path) for name, path in sorted(self.voices.items())},
        )


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build made: the layer of its warm state (None when the Dockerfile baked), and the proof."""

    layer: Layer | None
    evidence: Evidence


def check(request: Request, engine: Engine) -> None:
    """Find out whether a build can work, before anything slow.

    Raises:
        BadInputError: the request cannot be.
        EngineError: the engine cannot do it.
    """
    if not (request.checkout / "Dockerfile").is_file():
        raise BadInputError(f"{request.checkout} has no Dockerfile", next_step="name a checkout of this project")
    for name, clip in request.voices.items():
        check_voice_name(name)
        if not clip.is_file():
            raise BadInputError(f"there is no clip {clip}", next_step="name an audio file: --voice NAME=PATH")
    _check_tag(request, engine)
    _check_route(request, engine)
    if engine.facts.free is not None and engine.facts.free < _ROOM:
        raise EngineError(
            f"the engine has {engine.facts.free / 1e9:.0f} GB left for images, and a build needs about "
            f"{_ROOM / 1e9:.0f}",
            next_step="remove images (`docker image prune`) or the builder's cache (`docker builder prune`)",
        )


def _check_tag(request: Request, engine: Engine) -> None:
    if not request.replacing and engine.exists(request.tag):
        raise BadInputError(
            f"there is an image {request.tag!r} already", next_step="choose another --tag, or take it with --replace"
        )


def _check_route(request: Request, engine: Engine) -> None:
    on_gpu = request.device.startswith("cuda")
    if request.route == "export":
        engine.check_device(request.device)
    elif request.route == "no-gpu" and not on_gpu:
        raise BadInputError("--route no-gpu is for an image for a GPU", next_step="add --device cuda, or leave it out")
    elif request.route == "dockerfile" and request.voices:
        raise BadInputError("the Dockerfile bakes no voices", next_step="use --route export")
    elif request.route == "dockerfile" and on_gpu and engine.facts.default_runtime != "nvidia":
        raise EngineError(
            f"the engine's default runtime is {engine.facts.default_runtime!r}, so that a build sees no GPU",
            next_step='set "default-runtime": "nvidia" in the engine\'s configuration, or use --route export',
        )


def plan(request: Request, engine: Engine) -> list[str]:
    """The steps of a build, in words and commands."""
    gpu = f", with the engine's GPUs ({engine.facts.gpu})" if request.device.startswith("cuda") else ""
    head = [
        f"engine: {engine.facts.name} {engine.facts.version}, GPUs through {engine.facts.gpu or 'nothing'}",
        f"route: {request.route}",
    ]
    tail = [
        "prove: a fresh container, read-only, without network, as a foreign user, must miss nothing",
        f"tag: {request.tag}",
    ]
    if request.route == "dockerfile":
        return [
            *head,
            shlex.join(engine.build_command(_arguments(request, "runtime", _unproven(request.tag, "runtime")))),
            *tail,
        ]
    bake = shlex.join(["bake", *request.recipe().arguments()])
    return [
        *head,
        shlex.join(engine.build_command(_arguments(request, "cold", _unproven(request.tag, "cold")))),
        f"state: that of {request.warm} if it was made by the same recipe and fits the image; otherwise",
        "  " + shlex.join(engine.build_command(_arguments(request, "tools", _unproven(request.tag, "tools")))),
        f"  in a container of it{gpu if request.route == 'export' else ''}: {bake}",
        "pack: the state as a layer, loaded on top",
        *tail,
    ]


def build(request: Request, engine: Engine, *, say: Callable[[str], None] = logger.info) -> Built:
    """Build an image, prove it, and give it its name.

    Whatever ends it, no container, no volume and no half-made image stays; the state of a bake that was finished does.

    Args:
        request: what to build.
        engine: to build with.
        say: called with one line for each step.

    Raises:
        BadInputError, EngineError: as `check`; or a step failed.
        NotWarmError: a container of the image missed; nothing was tagged.
    """
    check(request, engine)
    with contextlib.ExitStack() as stack:

        def temporary(stage: str) -> str:
            """A name that goes at the end, with the image if it has no other."""
            name = _unproven(request.tag, stage)
            stack.callback(engine.forget, name)
            return name

        if request.route == "dockerfile":
            unproven = temporary("runtime")
            _build(engine, request, "runtime", unproven, say)
            layer, image = None, _labelled(engine, unproven)
        else:
            cold = temporary("cold")
            _build(engine, request, "cold", cold, say)
            unproven = temporary("warm")
            layer, image = _with_state(request, engine, cold, unproven, temporary, say)
        say("prove, in a container of it")
        evidence = prove(engine, unproven, device="cpu" if request.route == "no-gpu" else request.device)
        require_passed(evidence)
        labels = {EVIDENCE: f"sha256:{hashlib.sha256(evidence.to_json().encode()).hexdigest()}"}
        proven = add_layers(image, [], Change(labels=labels), created=image.config["created"])
        engine.load(unproven, [], proven, temporary("proven"))
        _check_tag(request, engine)  # minutes have passed, and somebody may have taken the name
        engine.tag(_unproven(request.tag, "proven"), request.tag)
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
    with exclusive(warm):
        if _made_by(warm) == request.recipe():
            say(f"the state of {warm} was made by this recipe")
            try:
                made = _append_here(request, engine, cold, unproven)
                _verify(engine, unproven, request)
            except (IntegrityError, FingerprintMismatchError) as error:
                say(f"it is of no use here: {error.message}")
            else:
                say("it fits the image: nothing is baked")
                return made
        tools = temporary("tools")
        _build(engine, request, "tools", tools, say)
        say("bake, in a container")
        _bake(request, engine, tools, warm)
    return _append_here(request, engine, cold, unproven)


def _bake(request: Request, engine: Engine, tools: str, warm: Path) -> None:
    """Bake in a container and put the state in its place here, all of it or nothing."""
    recipe = request.recipe()
    places = {name: PurePosixPath("/tmp") / f"{name}{clip.suffix}" for name, clip in request.voices.items()}  # noqa: S108
    command = ["bake", *recipe.arguments()]
    for name, place in places.items():
        command += ["--voice", f"{name}={place}"]
    with staging_folder(warm) as staging:
        container = Run(
            image=tools,
            command=command,
            device=recipe.device,
            isolated=False,
            files={place: request.voices[name] for name, place in places.items()},
            environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
            export=(PurePosixPath(WARM), staging),
            follow=True,
        )
        engine.run(container)
        manifest = manifests.read(staging)
        manifests.check_layout(manifest, staging)
        _recipe_file(warm).unlink(missing_ok=True)
        seal(staging)
        put_in_place(staging, warm)
    _recipe_file(warm).write_text(json.dumps(asdict(recipe), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _append_here(request: Request, engine: Engine, cold: str, unproven: str) -> tuple[Layer, Image]:
    """Load the state that is kept on top of the cold image."""
    base = engine.image(cold)
    with gather([request.warm]) as addition:
        change = change_for(base, addition, device=request.device)
        image = add_layers(base, addition.layers, change, created=addition.created)
        engine.load(cold, addition.layers, image, unproven)
        return addition.layers[0], image


def _labelled(engine: Engine, image: str) -> Image:
    """An image whose state a Dockerfile made, with the labels that a Dockerfile cannot know."""
    _, text = engine.run(Run(image=image, command=["inspect", "--json"]))
    manifest = manifests.from_json(text, source=f"the manifest in {image}")
    found = engine.image(image)
    return add_layers(found, [], Change(labels=labels_of([manifest])), created=manifest.created)


def _verify(engine: Engine, image: str, request: Request) -> None:
    """Whether the state of an image fits it, and the engine's GPU.

    Raises:
        FingerprintMismatchError, IntegrityError: it does not.
    """
    device = request.recipe().device
    engine.run(Run(image=image, command=["verify", "--device", device], device=device))


def _made_by(warm: Path) -> Recipe | None:
    """The recipe of the state that is kept there, if it is known."""
    if not (warm / manifests.MANIFEST_NAME).is_file():
        return None
    try:
        return Recipe(**json.loads(_recipe_file(warm).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _recipe_file(warm: Path) -> Path:
    """Beside the state, which holds nothing that its manifest does not list."""
    return warm.with_name(f"{warm.name}.recipe.json")


def _unproven(tag: str, stage: str) -> str:
    """The name of an image in the making: that of a build which was killed is replaced by the next."""
    return f"chatterbox-prewarm-unproven:{stage}-{hashlib.sha256(tag.encode()).hexdigest()[:12]}"


def _arguments(request: Request, stage: str, tag: str) -> list[str]:
    """Of the build of a stage."""
    arguments = dict(request.arguments)
    if stage == "runtime":
        arguments |= {
            "DEVICE": request.device,
            "PROFILE": request.profile,
            "T3_DTYPE": request.t3_dtype,
            "LEVELS": request.levels,
        }
    return [
        f"--network={request.network}",
        *(word for secret in request.secrets for word in ("--secret", secret)),
        *(word for name, value in sorted(arguments.items()) for word in ("--build-arg", f"{name}={value}")),
        *("--target", stage, "--tag", tag, str(request.checkout)),
    ]


def _build(engine: Engine, request: Request, stage: str, tag: str, say: Callable[[str], None]) -> None:
    arguments = _arguments(request, stage, tag)
    say(shlex.join(engine.build_command(arguments)))
    run_build(engine, arguments)
