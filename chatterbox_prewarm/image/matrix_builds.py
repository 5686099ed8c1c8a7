"""A series of builds on one engine: the bakes of a matrix, each as an image of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import FingerprintMismatchError
from chatterbox_prewarm.system.fingerprint import ABSENT

if TYPE_CHECKING:
    from chatterbox_prewarm.image.build_request import Request
    from chatterbox_prewarm.image.matrix import Bake, Matrix


@dataclass(frozen=True, kw_only=True)
class Series:
    """The builds, and for each bake that is left to another machine one line with its number and the reason."""

    requests: tuple[Request, ...]
    left: tuple[str, ...]


def series(matrix: Matrix, template: Request, *, gpu: str) -> Series:
    """What of a matrix can be built here.

    Args:
        matrix: the bakes.
        template: what they have in common. Its tag, or without one the matrix's target, and its `warm` get the name of
            the bake added.
        gpu: of this machine, as NVML calls it, or `absent`.

    Raises:
        FingerprintMismatchError: none of them.
    """
    requests, left = [], []
    for number, bake in enumerate(matrix.bakes):
        if reason := _reason(bake, template.route, gpu):
            left.append(f"{number}: {bake.title}: {reason}")
            continue
        requests.append(
            replace(
                template,
                tag=_tag(template.tag or matrix.target, bake.name),
                warm=template.warm / bake.name,
                device=bake.device,
                profile=bake.profile,
                t3_dtype=bake.t3_dtype,
                levels=bake.levels,
                voices=bake.voices,
                arguments={**template.arguments, "VARIANT": bake.variant},
            )
        )
    if not requests:
        raise FingerprintMismatchError(
            f"none of the bakes can be made here: {'; '.join(left)}",
            next_step="run it on a machine with such a GPU, or add --route no-gpu for what depends on none",
        )
    return Series(requests=tuple(requests), left=tuple(left))


def _reason(bake: Bake, route: str, gpu: str) -> str:
    """Why a bake cannot be made here, or nothing."""
    if route == "no-gpu":
        return "" if bake.gpu else "--route no-gpu is for images for a GPU"
    if not bake.gpu or bake.gpu == gpu:
        return ""
    return "this machine has no GPU" if gpu == ABSENT else f"this machine has the GPU {gpu}"


def _tag(tag: str, name: str) -> str:
    """A name of an image with one more word in its last part."""
    return f"{tag}-{name}" if ":" in tag.rpartition("/")[2] else f"{tag}:{name}"
