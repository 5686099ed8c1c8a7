"""The request for a build: its settings, the checks before it starts, and the commands that it runs."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError, PrewarmError
from chatterbox_prewarm.image.dockerfile import for_classic
from chatterbox_prewarm.image.labels import variants_of
from chatterbox_prewarm.model.profiles import default_execution
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.state.places import check_state_place, check_states_place
from chatterbox_prewarm.state.provenance import builder_args, check_base_image
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.system.gpu_targets import check_targets
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, get_variant

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.image.engines.engine import Engine

#: Where the bake runs: in a container, in a step of the Dockerfile, or on the CPU for an image for a GPU.
ROUTES = ("export", "dockerfile", "no-gpu")
#: Docker's builders: BuildKit supports mounts and secrets, its predecessor does not.
BUILDERS = ("buildkit", "classic")
#: The build arguments that select stages, with the Dockerfile's defaults. They are always passed, because podman 4.3
#: ignores the defaults when it decides which stages a target needs.
STAGE_ARGUMENTS = {"DEPS": "packages", "PACKAGES": "lean", "WEIGHTS": "hub"}
_PROOF_STEP = (
    "prove: a fresh container with a read-only root, without network and as another user must have no cache miss"
)
#: Bytes that a build needs where the engine stores images: twice the packages, the weights, and temporary files.
BUILD_BYTES = 20_000_000_000


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """The settings of a build.

    Attributes:
        checkout: checkout of this project, with its Dockerfile.
        tag: name of the image.
        warm: where the warm state is stored for the next build.
        device: torch device that the image is for.
        route: where the bake runs; one of `ROUTES`.
        builder: Docker's builder; one of `BUILDERS`. A step of the classic builder has the GPU of the engine's default
            runtime.
        profile: how the model runs. A bake without the GPU of the image uses `eager`.
        t3_dtype: dtype of T3's transformer.
        levels: warm-up levels, separated by commas.
        voices: names and reference clips of voices to bake.
        arguments: build arguments of the Dockerfile.
        secrets: secrets in the format of `docker build --secret`.
        network: network in the format of `docker build --network`.
        replacing: take the tag from an image that has it.
        rebake: bake even if the stored state has the same recipe.
        targets: GPUs to compile for where the engine has none, as `find_target` takes them. With several targets or
            models, `warm` is a folder that gets a state for each.
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
    targets: tuple[str, ...] = ()

    @property
    def classic(self) -> bool:
        """True if the classic builder builds the image."""
        return self.builder == "classic"

    @property
    def variants(self) -> list[str]:
        """The variants of the image's models: of the Dockerfile's build argument."""
        return variants_of(self.arguments.get("VARIANT", "")) or [DEFAULT_VARIANT.name]

    @property
    def several_states(self) -> bool:
        """True if the bake makes several states, which are in folders of `warm`."""
        return len(self.targets) > 1 or len(self.variants) > 1

    @property
    def may_reuse(self) -> bool:
        """True if the build may use a stored state with the same recipe, which is stored for one state only."""
        return not (self.rebake or self.targets or self.several_states)

    @property
    def bake_device(self) -> str:
        """The device that the bake uses. The route `no-gpu` bakes only the families that do not depend on a GPU."""
        return "cpu" if self.route == "no-gpu" else self.device

    @property
    def engine_device(self) -> str:
        """The device that the containers of the build get."""
        return "cpu" if self.targets else self.bake_device

    def recipe(self) -> dict[str, Any]:
        """Return the settings of the bake, with digests of clips. A stored state with the same recipe is reused."""
        return {
            "device": self.bake_device,
            "profile": "eager" if self.route == "no-gpu" else self.profile,
            "t3_dtype": self.t3_dtype,
            "levels": self.levels,
            "voices": {name: hash_file(path) for name, path in sorted(self.voices.items())},
        }

    def bake_command(self) -> list[str]:
        """Return the command of the bake, without the arguments for voices."""
        recipe = self.recipe()
        names = ["device", "profile", "t3_dtype", *(() if self.targets else ("levels",))]
        words = [word for name in names for word in (f"--{name.replace('_', '-')}", recipe[name])]
        # A container has no terminal, so the bake would be silent. Its lines are shown as details of this build's step.
        return ["--progress", "bake", *words, *(word for target in self.targets for word in ("--target", target))]

    def rebake_hint(self) -> str:
        """Say how to replace a state that failed its proof: the next build reuses the state of one model."""
        # The bake step of the Dockerfile has no other input that a user would change.
        cached = "empty the builder's cache, which contains the bake, and " if self.route == "dockerfile" else ""
        if self.several_states:
            return f"{cached}build again on this kind of machine"
        return f"{cached}build with --rebake on this kind of machine, because a build reuses {self.warm} otherwise"

    def build_arguments(self, stage: str, tag: str) -> list[str]:
        """Return the arguments of the engine's build of a stage."""
        arguments = {**STAGE_ARGUMENTS, **self.arguments}
        if stage == "bake":
            arguments |= {
                "DEVICE": self.device,
                "PROFILE": self.profile,
                "T3_DTYPE": self.t3_dtype,
                "LEVELS": self.levels,
                **({"TARGET": ",".join(self.targets)} if self.targets else {}),
                **builder_args(self.arguments, os.environ),
            }
        return [
            f"--network={self.network}",
            *(word for secret in self.secrets for word in ("--secret", secret)),
            *(word for name, value in sorted(arguments.items()) for word in ("--build-arg", f"{name}={value}")),
            *(("--file=-",) if self.classic else ()),  # standard input; see `classic_dockerfile`
            *("--target", stage, "--tag", tag, str(self.checkout)),
        ]

    def classic_dockerfile(self, stage: str) -> str | None:
        """Return the Dockerfile of a stage for the classic builder; None for BuildKit, which reads the original.

        Raises:
            BadInputError: there is no such stage.
        """
        if not self.classic:
            return None
        return for_classic((self.checkout / "Dockerfile").read_text(encoding="utf-8"), self.arguments, stage)

    def command_line(self, engine: Engine, stage: str, tag: str) -> str:
        """Return the build of a stage as a user would type it."""
        line = shlex.join(engine.build_command(self.build_arguments(stage, tag), classic=self.classic))
        if not self.classic:
            return line
        printed = ["chatterbox-prewarm", "dockerfile", "--for", "classic", "--checkout", str(self.checkout)]
        for name, value in sorted(self.arguments.items()):
            printed += ["--build-arg", f"{name}={value}"]
        return f"{shlex.join([*printed, '--target', stage])} | {line}"


def check_request(request: BuildRequest, engine: Engine) -> None:
    """Check whether a build can succeed, before anything slow starts.

    Raises:
        BadInputError: the request is invalid.
        EngineError: the engine cannot do the build.
    """
    if not (request.checkout / "Dockerfile").is_file():
        raise BadInputError(f"{request.checkout} has no Dockerfile", next_step="name a checkout of this project")
    for name in request.variants:
        get_variant(name)
    check_place = check_states_place if request.several_states else check_state_place
    check_place(request.warm)
    for name, clip in request.voices.items():
        check_voice_name(name)
        if not clip.is_file():
            raise BadInputError(f"there is no clip {clip}", next_step="name an audio file: --voice NAME=PATH")
    check_base_image(builder_args(request.arguments, os.environ).get("BASE_DIGEST", ""))
    if request.profile == "compiled" and request.arguments.get("PACKAGES") != "full":
        raise BadInputError(
            "the profile compiled needs Triton, which an image has only with all packages",
            next_step="add --build-arg PACKAGES=full",
        )
    check_tag(request, engine)
    _check_route(request, engine)
    if request.classic:
        engine.build_command([], classic=True)
        if request.secrets:
            raise BadInputError(
                "the classic builder does not support secrets",
                next_step="build the stages `deps-lean` and `deps-full` with BuildKit as IMAGE-lean and IMAGE-full, "
                "and add --build-arg DEPS=IMAGE",
            )
    free = engine.info.free_bytes
    if free is not None and free < BUILD_BYTES:
        raise EngineError(
            f"the engine has {free / 1e9:.0f} GB left for images, but a build needs about {BUILD_BYTES / 1e9:.0f} GB",
            next_step=f"remove images (`{engine.info.name.lower()} image prune`) or the builder's cache",
        )


def check_tag(request: BuildRequest, engine: Engine) -> None:
    """Check that no image has the tag, unless the request replaces it.

    Raises:
        BadInputError: an image has the tag.
    """
    if not request.replacing and engine.exists(request.tag):
        raise BadInputError(
            f"an image {request.tag!r} exists already",
            next_step="choose another --tag, or replace that image with --replace",
        )


def _check_route(request: BuildRequest, engine: Engine) -> None:
    on_gpu = request.device.startswith("cuda")
    default_execution(request.device, profile=request.profile, t3_dtype=request.t3_dtype)
    if "TARGET" in request.arguments:
        raise BadInputError("TARGET is an option here", next_step="use --target instead of --build-arg TARGET=...")
    if request.targets:
        check_targets(request.targets, request.device, request.profile, request.t3_dtype)
        if request.route == "no-gpu":
            raise BadInputError("--route no-gpu compiles nothing for a target", next_step="leave out --route no-gpu")
        on_gpu = False  # the engine needs none
    if request.route == "export":
        engine.check_device(request.engine_device)
    elif request.route == "no-gpu" and not on_gpu:
        raise BadInputError("--route no-gpu is for an image for a GPU", next_step="add --device cuda, or leave it out")
    elif request.route == "dockerfile" and request.voices:
        raise BadInputError("the Dockerfile cannot bake voices", next_step="use --route export")
    elif request.route == "dockerfile" and on_gpu and engine.info.default_runtime != "nvidia":
        raise EngineError(
            f"the engine's default runtime is {engine.info.default_runtime!r}, so a build has no GPU",
            next_step='set "default-runtime": "nvidia" in the engine\'s configuration, or use --route export',
        )
    elif request.route == "dockerfile" and on_gpu and not request.classic:
        # https://github.com/moby/buildkit/issues/1800
        raise EngineError(
            "BuildKit gives a step no GPU, even if the engine's default runtime does",
            next_step="use --builder classic, or --route export",
        )


def describe_routes(request: BuildRequest, engine: Engine) -> list[str]:
    """Say for each route whether the engine can use it for the request's device."""
    lines = []
    for route in ROUTES:
        try:
            _check_route(replace(request, route=route), engine)
            lines.append(f"route {route}: possible")
        except PrewarmError as error:
            lines.append(f"route {route}: not possible: {error.message}; {error.next_step}")
    return lines


def describe_plan(request: BuildRequest, engine: Engine) -> list[str]:
    """Return the steps of a build as sentences and commands."""

    def command(stage: str) -> str:
        return request.command_line(engine, stage, unproven_name(request.tag, stage))

    if request.route == "dockerfile":
        bake = [f"  {command('bake')}"]
    else:
        on_gpu = request.route == "export" and request.engine_device.startswith("cuda")
        gpus = f", with the engine's GPUs ({engine.info.gpu})" if on_gpu else ""
        words = shlex.join(request.bake_command())
        bake = [f"  {command('tools')}", f"  in a container of that image{gpus}: {words}"]
    return [
        f"engine: {engine.info.name} {engine.info.version}, GPUs through {engine.info.gpu or 'nothing'}",
        f"selected route: {request.route}",
        command("cold"),
        f"state: {request.warm}, if it has the same recipe and fits the image; otherwise a new bake"
        if request.may_reuse
        else "state: a new bake",
        *bake,
        "pack: load the state on top, as an image layer",
        "no proof, which needs the GPU" if request.targets else _PROOF_STEP,
        f"tag: {request.tag}",
    ]


def unproven_name(tag: str, stage: str) -> str:
    """Return the name of an unfinished image. The next build after a killed one uses the same name again."""
    return f"chatterbox-prewarm-unproven:{stage}-{hashlib.sha256(tag.encode()).hexdigest()[:12]}"
