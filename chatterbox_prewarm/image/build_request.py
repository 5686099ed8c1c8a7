"""What a build is asked for, whether an engine can do it, and the steps that it takes."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, EngineError, PrewarmError
from chatterbox_prewarm.image.dockerfile import for_classic
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.state.provenance import check_base_image, told
from chatterbox_prewarm.system.digests import hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.image.engines.engine import Engine

#: How the bake gets at the device: in a container, in a step of the Dockerfile, or without it.
ROUTES = ("export", "dockerfile", "no-gpu")
#: Of Docker's: the one that knows mounts and secrets, and the one before it.
BUILDERS = ("buildkit", "classic")
#: Bytes that a build needs where the engine keeps its images: the packages twice, the weights, and room to work.
_ROOM = 20_000_000_000


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
        builder: which of Docker's builds. The classic one gives a step the GPU of the engine's default runtime, and
            knows no secrets.
        profile: how the model executes; the recipe's is `eager` where the device is absent.
        t3_dtype: of T3's transformer.
        levels: of the warm-up, separated by commas.
        voices: names and reference clips to bake.
        arguments: build arguments of the Dockerfile.
        secrets: as `docker build --secret` has them.
        network: as `docker build --network` has it.
        replacing: take the name from an image that has it.
        rebake: bake, whatever state is kept.
    """

    checkout: Path
    tag: str
    warm: Path
    device: str
    route: str
    builder: str
    profile: str
    t3_dtype: str
    levels: str
    voices: Mapping[str, Path]
    arguments: Mapping[str, str]
    secrets: tuple[str, ...]
    network: str
    replacing: bool
    rebake: bool

    @property
    def classic(self) -> bool:
        """Whether the classic builder builds."""
        return self.builder == "classic"

    def recipe(self) -> Recipe:
        """What the bake is asked for; without the GPU that the image is for, only what depends on none."""
        without = self.route == "no-gpu"
        return Recipe(
            device="cpu" if without else self.device,
            profile="eager" if without else self.profile,
            t3_dtype=self.t3_dtype,
            levels=self.levels,
            voices={name: hash_file(path) for name, path in sorted(self.voices.items())},
        )


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
    check_base_image(told(request.arguments, os.environ).get("BASE_DIGEST", ""))
    check_tag(request, engine)
    _check_route(request, engine)
    if request.classic:
        engine.build_command([], classic=True)
        if request.secrets:
            raise BadInputError(
                "the classic builder knows no secrets",
                next_step="make an image of the stage `deps` with BuildKit, and name it with --build-arg DEPS=IMAGE",
            )
    if engine.facts.free is not None and engine.facts.free < _ROOM:
        raise EngineError(
            f"the engine has {engine.facts.free / 1e9:.0f} GB left for images, and a build needs about "
            f"{_ROOM / 1e9:.0f}",
            next_step=f"remove images (`{engine.facts.name.lower()} image prune`), or the builder's cache",
        )


def check_tag(request: Request, engine: Engine) -> None:
    """Refuse to take a name from an image that has it.

    Raises:
        BadInputError: it is taken, and not to be replaced.
    """
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
    elif request.route == "dockerfile" and on_gpu and not request.classic:
        # https://github.com/moby/buildkit/issues/1800
        raise EngineError(
            "BuildKit gives a step no GPU, whatever the engine's default runtime",
            next_step="use --builder classic, or --route export",
        )


def routes(request: Request, engine: Engine) -> list[str]:
    """Of each route, in words, whether the engine can take it for the request's device."""
    found = []
    for route in ROUTES:
        try:
            _check_route(replace(request, route=route), engine)
            found.append(f"route {route}: possible")
        except PrewarmError as error:
            found.append(f"route {route}: not here: {error.message}; {error.next_step}")
    return found


def plan(request: Request, engine: Engine) -> list[str]:
    """The steps of a build, in words and commands."""
    gpu = f", with the engine's GPUs ({engine.facts.gpu})" if request.device.startswith("cuda") else ""
    head = [
        f"engine: {engine.facts.name} {engine.facts.version}, GPUs through {engine.facts.gpu or 'nothing'}",
        f"route taken: {request.route}",
    ]

    def command(stage: str) -> str:
        return in_words(request, engine, stage, unproven_name(request.tag, stage))

    bake = [f"  {command('bake')}"]
    if request.route != "dockerfile":
        words = shlex.join(["bake", *request.recipe().arguments()])
        bake = [f"  {command('tools')}", f"  in a container of it{gpu if request.route == 'export' else ''}: {words}"]
    return [
        *head,
        command("cold"),
        "state: baked anew"
        if request.rebake
        else f"state: that of {request.warm} if it was made by the same recipe and fits the image; otherwise",
        *bake,
        "pack: the state as a layer, loaded on top",
        "prove: a fresh container, read-only, without network, as a foreign user, must miss nothing",
        f"tag: {request.tag}",
    ]


def again(request: Request) -> str:
    """How to come to another state than one that missed: as it is, it is kept, and fits."""
    # The step of the Dockerfile has no other input that a user would change.
    cached = "empty the builder's cache, which has the bake, and " if request.route == "dockerfile" else ""
    return f"{cached}build with --rebake on this kind of machine, since {request.warm} is taken again otherwise"


def unproven_name(tag: str, stage: str) -> str:
    """The name of an image in the making: that of a build which was killed is replaced by the next."""
    return f"chatterbox-prewarm-unproven:{stage}-{hashlib.sha256(tag.encode()).hexdigest()[:12]}"


def in_words(request: Request, engine: Engine, stage: str, tag: str) -> str:
    """The build of a stage, as one would type it."""
    line = shlex.join(engine.build_command(arguments_of(request, stage, tag), classic=request.classic))
    if not request.classic:
        return line
    printed = ["chatterbox-prewarm", "dockerfile", "--for", "classic", "--checkout", str(request.checkout)]
    for name, value in sorted(request.arguments.items()):
        printed += ["--build-arg", f"{name}={value}"]
    return f"{shlex.join([*printed, '--target', stage])} | {line}"


def dockerfile_of(request: Request, stage: str) -> str | None:
    """The Dockerfile for the build of a stage, where it is not that of the checkout.

    Raises:
        BadInputError: there is no such stage.
    """
    if not request.classic:
        return None
    text = (request.checkout / "Dockerfile").read_text(encoding="utf-8")
    return for_classic(text, request.arguments, stage)


def arguments_of(request: Request, stage: str, tag: str) -> list[str]:
    """Arguments of the engine's build of a stage."""
    arguments = dict(request.arguments)
    if stage == "bake":
        arguments |= {
            "DEVICE": request.device,
            "PROFILE": request.profile,
            "T3_DTYPE": request.t3_dtype,
            "LEVELS": request.levels,
            **told(request.arguments, os.environ),
        }
    return [
        f"--network={request.network}",
        *(word for secret in request.secrets for word in ("--secret", secret)),
        *(word for name, value in sorted(arguments.items()) for word in ("--build-arg", f"{name}={value}")),
        *(("--file=-",) if request.classic else ()),  # as `dockerfile_of` has it
        *("--target", stage, "--tag", tag, str(request.checkout)),
    ]
