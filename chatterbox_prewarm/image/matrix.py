"""The matrix of a project: a list of the bakes that its images need, in the file `prewarm.toml`.

    [image]
    base = "registry.example.com/speech:cold"
    target = "registry.example.com/speech:1"

    [[bake]]
    variants = ["english"]
    gpus = ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    profiles = ["aot"]
    voices = { fox = "clips/fox.wav" }

Each combination of a table's variants, GPUs and profiles is one bake. The bakes are numbered in the order of the file.
An empty list of GPUs is a bake for the CPU.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, from_os_error
from chatterbox_prewarm.model.profiles import PROFILES, T3_DTYPES
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.system.fingerprint import ABSENT
from chatterbox_prewarm.system.gpu_names import nvml_name
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, VARIANTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from chatterbox_prewarm.image.build_request import BuildRequest

MATRIX_NAME = "prewarm.toml"
#: The keys of a table `[[bake]]` and their default values.
_BAKE_DEFAULTS: Mapping[str, Any] = {
    "variants": [DEFAULT_VARIANT.name],
    "gpus": [],
    "profiles": ["aot"],
    "t3_dtype": "float32",
    "levels": "1,2,3",
    "voices": {},
}


@dataclass(frozen=True, kw_only=True)
class Bake:
    """One bake of a matrix.

    Attributes:
        gpu: product name as NVML reports it, or "" for the CPU.
        levels: warm-up levels, separated by commas.
        voices: names of voices and their reference clips.
    """

    variant: str
    gpu: str
    profile: str
    t3_dtype: str
    levels: str
    voices: Mapping[str, Path]

    @property
    def device(self) -> str:
        """The torch device, "cuda" or "cpu"."""
        return "cuda" if self.gpu else "cpu"

    @property
    def title(self) -> str:
        """A description for users."""
        return f"{self.variant}, {self.gpu or 'CPU'}, {self.profile}, {self.t3_dtype}"

    @property
    def name(self) -> str:
        """The title as part of the name of a file or an image; unique in a matrix."""
        # Unusual characters become their code points, because "L4+" and "L4" are two GPUs.
        words = re.sub(r"[^a-z0-9.,_\- ]", lambda match: f"x{ord(match[0]):x}", self.title.lower())
        return re.sub(r"[^a-z0-9.]+", "-", words)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """The bakes of a project.

    Attributes:
        base: the image without a state, to which the states are added.
        target: the name of the resulting image.
    """

    base: str
    target: str
    bakes: tuple[Bake, ...]


def read_matrix(path: Path) -> Matrix:
    """Read a matrix. Paths of clips are relative to its folder.

    Raises:
        BadInputError: the file cannot be read, is not a matrix, or has an unknown variant, GPU, profile or dtype.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _invalid(path, f"it is not TOML: {error}") from error
    except OSError as error:
        raise from_os_error(error, f"reading the matrix {path}") from error
    if unknown := raw.keys() - {"image", "bake"}:
        raise _invalid(path, f"it has an unknown table {min(unknown)!r}")
    image, tables = raw.get("image"), raw.get("bake")
    if not isinstance(image, dict) or image.keys() != {"base", "target"}:
        raise _invalid(path, "its table [image] must have exactly the keys `base` and `target`")
    if not all(isinstance(value, str) and value for value in image.values()):
        raise _invalid(path, "the base and the target must be names of images")
    if not isinstance(tables, list) or not tables:
        raise _invalid(path, "it has no table [[bake]]")
    bakes = tuple(bake for table in tables for bake in _read_bakes(path, table))
    if len({bake.name for bake in bakes}) != len(bakes):
        raise _invalid(path, "two of its bakes have the same variant, GPU and profile")
    return Matrix(base=image["base"], target=image["target"], bakes=bakes)


def to_toml(matrix: Matrix) -> str:
    """Write a matrix as text for `read_matrix`, with one table for each bake and the paths of clips unchanged."""

    def text(value: str) -> str:
        # A JSON string is also a TOML string, unless it contains the character U+007F. Names do not contain it.
        return json.dumps(value, ensure_ascii=False)

    lines = ["[image]", f"base = {text(matrix.base)}", f"target = {text(matrix.target)}"]
    for bake in matrix.bakes:
        voices = ", ".join(f"{text(name)} = {text(str(clip))}" for name, clip in bake.voices.items())
        lines += [
            "",
            "[[bake]]",
            f"variants = [{text(bake.variant)}]",
            f"gpus = [{text(bake.gpu) if bake.gpu else ''}]",
            f"profiles = [{text(bake.profile)}]",
            f"t3_dtype = {text(bake.t3_dtype)}",
            f"levels = {text(bake.levels)}",
            f"voices = {{ {voices} }}" if voices else "voices = {}",
        ]
    return "\n".join(lines) + "\n"


def select_builds(matrix: Matrix, template: BuildRequest, *, gpu: str) -> tuple[list[BuildRequest], list[str]]:
    """Select the bakes that this machine can run. Each becomes the build of one image.

    Args:
        matrix: the bakes.
        template: settings that all builds share. Each build gets the template's tag (by default the target of the
            matrix) and `warm` directory, both with the name of the bake added.
        gpu: GPU of this machine as NVML reports it, or `ABSENT`.

    Returns:
        the builds, and for each skipped bake one line with its number and the reason.

    Raises:
        FingerprintMismatchError: this machine can run no bake of the matrix.
    """
    requests, skipped = [], []
    tag = template.tag or matrix.target
    separator = "-" if ":" in tag.rpartition("/")[2] else ":"
    for number, bake in enumerate(matrix.bakes):
        if reason := _reason_to_skip(bake, template.route, gpu):
            skipped.append(f"{number}: {bake.title}: {reason}")
            continue
        requests.append(
            replace(
                template,
                tag=f"{tag}{separator}{bake.name}",
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
            f"this machine can do no bake of the matrix: {'; '.join(skipped)}",
            next_step="run this on a machine with such a GPU, or add --route no-gpu to bake only what needs no GPU",
        )
    return requests, skipped


def _reason_to_skip(bake: Bake, route: str, gpu: str) -> str:
    """Say why this machine cannot run a bake; "" if it can."""
    if route == "no-gpu":
        return "" if bake.gpu else "--route no-gpu is only for images for a GPU"
    if not bake.gpu or bake.gpu == gpu:
        return ""
    return "this machine has no GPU" if gpu == ABSENT else f"this machine has the GPU {gpu}"


def _read_bakes(path: Path, raw: Any) -> list[Bake]:
    """Read the bakes of one table `[[bake]]`."""
    if not isinstance(raw, dict):
        raise _invalid(path, "a [[bake]] is not a table")
    if unknown := raw.keys() - _BAKE_DEFAULTS.keys():
        raise _invalid(path, f"a [[bake]] has the unknown key {min(unknown)!r}")
    table = {**_BAKE_DEFAULTS, **raw}
    _check_texts(path, "variants", table["variants"], VARIANTS)
    _check_texts(path, "profiles", table["profiles"], PROFILES)
    _check_texts(path, "t3_dtype", [table["t3_dtype"]], T3_DTYPES)
    _check_texts(path, "gpus", table["gpus"])
    levels, clips = table["levels"], table["voices"]
    if not isinstance(levels, str):
        raise _invalid(path, f'levels is {levels!r}, but must be text such as "1,2,3"')
    if not isinstance(clips, dict) or not all(isinstance(clip, str) for clip in clips.values()):
        raise _invalid(path, "voices must be a table of names and clips")
    gpus = [nvml_name(gpu) for gpu in table["gpus"]]
    voices = {check_voice_name(name): path.parent / clip for name, clip in clips.items()}
    return [
        Bake(variant=variant, gpu=gpu, profile=profile, t3_dtype=table["t3_dtype"], levels=levels, voices=voices)
        for variant, gpu, profile in product(table["variants"], gpus or [""], table["profiles"])
    ]


def _check_texts(path: Path, name: str, values: Any, allowed: Collection[str] | None = None) -> None:
    """Check that the value of a key is a list of strings, and that each string is allowed."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _invalid(path, f"{name} is {values!r}, but must be a list of texts")
    if allowed is not None and (unknown := [value for value in values if value not in allowed]):
        raise _invalid(path, f"{name} has {unknown[0]!r}; choose from: {', '.join(allowed)}")


def _invalid(path: Path, reason: str) -> BadInputError:
    return BadInputError(
        f"{path} is not a matrix of bakes: {reason}", next_step='see the section "On a cluster" in docs/images.md'
    )
