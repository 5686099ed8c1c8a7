"""build, dockerfile: the commands that build an image from a checkout of this project."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.commands.options import (
    DEVICE,
    PATH,
    check_output,
    exit_on_sigterm,
    json_option,
    note,
    option,
    parse_pair,
    parse_voice,
    refuse_options,
    show,
    targets_option,
    wants_json,
)
from chatterbox_prewarm.commands.progress import say
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.build_request import BUILDERS, ROUTES
from chatterbox_prewarm.image.dockerfile import VARIANTS
from chatterbox_prewarm.image.engines.engine import ENGINES
from chatterbox_prewarm.model.profiles import PROFILES, T3_DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.image.build_request import BuildRequest
    from chatterbox_prewarm.image.layer import Layer
    from chatterbox_prewarm.proof.checks import Evidence

#: Options without effect for GPUs that the machine lacks, and the reason.
_NOT_WITH_A_TARGET = {"levels", "evidence"}, "--target, because without the GPU nothing is warmed up or proven"
#: Options that each bake of a matrix sets itself. Its evidence is next to its state.
_NOT_WITH_A_MATRIX = {"device", "targets", "profile", "t3_dtype", "levels", "voices", "evidence"}


@click.command(short_help="Build, bake, prove and tag an image.")
@click.option("--tag", default="", help="Name of the image. With --matrix, the default is derived from its target.")
@click.option("--matrix", type=PATH, help="Build an image for each bake of this file that this machine can run.")
@click.option("--checkout", type=PATH, default=Path(), help="Checkout of this project. Default: the current directory.")
@click.option("--warm", type=PATH, default=Path("out/warm"), show_default=True, help="Directory of the warm state.")
@option("--device", default="cpu", type=DEVICE, help="Torch device that the image is for, such as cpu or cuda.")
@targets_option
@click.option(
    "--route",
    default="export",
    show_default=True,
    type=click.Choice(ROUTES),
    help="Bake in a container (export), in the Dockerfile, or only what needs no GPU (no-gpu).",
)
@click.option(
    "--builder",
    default="buildkit",
    show_default=True,
    type=click.Choice(BUILDERS),
    help="Docker's builder. The steps of the classic one get the GPU of the engine's default runtime.",
)
@option("--profile", default="aot", type=click.Choice(PROFILES), help="How the model runs.")
@option("--t3-dtype", default="float32", type=click.Choice(T3_DTYPES), help="Data type of T3's transformer.")
@option("--levels", default="1,2,3", help="Warm-up levels, separated by commas.")
@click.option("--voice", "voices", multiple=True, metavar="NAME=PATH", help="Bake a voice from a clip; repeatable.")
@click.option(
    "--build-arg",
    "arguments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Build argument of the Dockerfile; repeatable.",
)
@click.option("--secret", "secrets", multiple=True, metavar="SPEC", help="Secret, as for docker build; repeatable.")
@click.option("--network", default="default", show_default=True, help="Network of the build, as for docker build.")
@option("--engine", "engine_name", default="docker", type=click.Choice(ENGINES), help="Engine that builds and runs.")
@click.option(
    "--evidence", type=PATH, help="Path of the evidence, also of a failed proof. Default: WARM.evidence.json."
)
@click.option("--replace", "replacing", is_flag=True, help="Replace an image that has this name.")
@click.option("--rebake", is_flag=True, help="Bake even if the existing state was made with the same recipe and fits.")
@click.option("--dry-run", is_flag=True, help="Check the engine and show the plan, but do nothing.")
@json_option
@click.pass_context
def build(
    context: click.Context,
    /,
    *,
    matrix: Path | None,
    engine_name: str,
    evidence: Path | None,
    dry_run: bool,
    **fields: Any,
) -> None:
    """Build an image on a container engine, bake a warm state, prove the image, and tag it if the proof passes.

    The warm state is kept. It is baked again only if something changed on which it depends. With --target, the image
    gets its tag without a proof, which needs the GPU; several targets give an image with a state for each.
    """
    from chatterbox_prewarm.image import build as building
    from chatterbox_prewarm.image.build_request import check_request, describe_plan, describe_routes
    from chatterbox_prewarm.image.engines.connect import connect
    from chatterbox_prewarm.proof.checks import default_evidence

    requests = _requests(context, matrix, fields)
    if not all(each.tag for each in requests):
        raise click.UsageError("Missing option '--tag'.")
    exit_on_sigterm()
    with contextlib.closing(connect(engine_name)) as engine:
        routes = describe_routes(requests[0], engine) if dry_run else []
        if routes and not wants_json():
            show("\n".join(routes), {})  # also if the request is refused
        for each in requests:  # before anything slow
            check_request(each, engine)
        if dry_run:
            plans = [{"tag": each.tag, "steps": describe_plan(each, engine)} for each in requests]
            show("\n".join(line for plan in plans for line in plan["steps"]), {"routes": routes, "plans": plans})
            return
        outputs = [evidence or default_evidence(each.warm) for each in requests]
        for output in outputs:
            check_output(output)
        made = []
        for each, output in zip(requests, outputs, strict=True):
            layers, proofs = building.build(each, engine, output, say=say)
            made.append(_Built(tag=each.tag, layers=layers, proofs=proofs))
            if not wants_json():
                show(made[-1].text(), {})
        if wants_json():
            show("", {"images": [each.to_document() for each in made]})


@dataclass(frozen=True, kw_only=True)
class _Built:
    """The result of a build, with the proof of each model by its file; none if a GPU is missing for them."""

    tag: str
    layers: Sequence[Layer]
    proofs: Mapping[Path, Evidence]

    def text(self) -> str:
        lines = [f"warm layer: {layer.size / 1e6:.1f} MB, diff id sha256:{layer.diff_id}" for layer in self.layers]
        if not self.proofs:
            lines.append(f"{self.tag}: unproven. On a machine with the GPU: prove --image {self.tag}")
        for path, proof in self.proofs.items():
            lines.append(f"{self.tag}: proven, {len(proof.checks)} checks passed, evidence {path}")
        return "\n".join(lines)

    def to_document(self) -> dict[str, Any]:
        return {
            "tag": self.tag,
            "layers": [{"bytes": layer.size, "diff_id": f"sha256:{layer.diff_id}"} for layer in self.layers],
            "proven": bool(self.proofs),
            "evidence": list(self.proofs),
        }


def _requests(context: click.Context, matrix: Path | None, fields: dict[str, Any]) -> Sequence[BuildRequest]:
    """Make the builds of a command line."""
    from chatterbox_prewarm.image.build_request import BuildRequest

    if fields["targets"]:
        refuse_options(context, *_NOT_WITH_A_TARGET)
    request = BuildRequest(
        **{
            **fields,
            "voices": dict(map(parse_voice, fields["voices"])),
            "arguments": dict(map(_parse_argument, fields["arguments"])),
        }
    )
    return [request] if matrix is None else _matrix_requests(context, matrix, request)


def _matrix_requests(context: click.Context, path: Path, template: BuildRequest) -> Sequence[BuildRequest]:
    """Make the builds of a matrix, and report builds that this machine cannot run."""
    from chatterbox_prewarm.image import matrix as matrices
    from chatterbox_prewarm.system.fingerprint import read_fingerprint

    refuse_options(context, _NOT_WITH_A_MATRIX, "--matrix")
    requests, skipped = matrices.select_builds(matrices.read_matrix(path), template, gpu=read_fingerprint("cuda").gpu)
    for line in skipped:
        note(f"skipped, because it needs another machine: {line}")
    return requests


@click.command(short_help="Print the Dockerfile for another builder.")
@click.option("--for", "variant", required=True, type=click.Choice(VARIANTS), help="Builder for the Dockerfile.")
@click.option("--checkout", type=PATH, default=Path(), help="Checkout of this project. Default: the current directory.")
@click.option("--target", default="runtime", show_default=True, help="Last stage, for the classic builder.")
@click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="Selects stages; repeatable.")
def dockerfile(*, variant: str, checkout: Path, target: str, arguments: tuple[str, ...]) -> None:
    """Print the Dockerfile for another builder: with a GPU in the bake step (cdi), or without mounts (classic).

    cdi needs BuildKit 0.20 and Buildx 0.22: docker buildx build --allow device=nvidia.com/gpu=all --build-arg
    DEVICE=cuda -f - .
    """
    from chatterbox_prewarm.image.dockerfile import for_cdi, for_classic

    path = checkout / "Dockerfile"
    if not path.is_file():
        raise BadInputError(f"{checkout} has no Dockerfile", next_step="name a checkout of this project")
    text = path.read_text(encoding="utf-8")
    found = for_cdi(text) if variant == "cdi" else for_classic(text, dict(map(_parse_argument, arguments)), target)
    click.echo(found, nl=False)


def _parse_argument(text: str) -> tuple[str, str]:
    return parse_pair("--build-arg", text)
