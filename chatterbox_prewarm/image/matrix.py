"""The matrix of a project: which warm states its images are to have, in `prewarm.toml`, a bake for each.

    [image]
    base = "registry.example.com/speech:cold"
    target = "registry.example.com/speech:1"

    [[bake]]
    variants = ["english"]
    gpus = ["NVIDIA H100 80GB HBM3", "NVIDIA L4"]
    profiles = ["aot"]
    voices = { fox = "clips/fox.wav" }

Every combination of a table's variants, GPUs and profiles is one bake, numbered in the order of the file. An empty list
of GPUs is a bake for the CPU.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field, fields
from itertools import product
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.model.profiles import PROFILES, T3_DTYPES
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.weights.variants import VARIANTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE = "prewarm.toml"


@dataclass(frozen=True, kw_only=True)
class Bake:
    """One bake: `gpu` is the product name that NVML gives, or empty for the CPU; voices are names and clips."""

    variant: str
    gpu: str
    profile: str
    t3_dtype: str
    levels: str
    voices: Mapping[str, Path]

    @property
    def device(self) -> str:
        """As torch names it."""
        return "cuda" if self.gpu else "cpu"

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.variant}, {self.gpu or 'CPU'}, {self.profile}, {self.t3_dtype}"

    @property
    def name(self) -> str:
        """The same as a part of a file's or an image's name; two bakes of a matrix have two."""
        words = re.sub(r"[^a-z0-9.,_\- ]", lambda found: f"x{ord(found[0]):x}", self.title.lower())  # an L4+ is no L4
        return re.sub(r"[^a-z0-9.]+", "-", words)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All bakes, and the images that they are added to."""

    base: str
    target: str
    bakes: tuple[Bake, ...]


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A table `[[bake]]` as it stands in the file."""

    variants: list[str] = field(default_factory=lambda: ["english"])
    gpus: list[str] = field(default_factory=list)
    profiles: list[str] = field(default_factory=lambda: ["aot"])
    t3_dtype: str = "float32"
    levels: str = "1,2,3"
    voices: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> Matrix:
    """Read a matrix; clips are named relative to its folder.

    Raises:
        BadInputError: it cannot be read, is no such matrix, or asks for what there is not.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _bad(path, f"it is not TOML: {error}") from error
    except OSError as error:
        raise from_os_error(error, f"reading the matrix {path}") from error
    if extra := raw.keys() - {"image", "bake"}:
        raise _bad(path, f"it has a table {min(extra)!r}")
    image, tables = raw.get("image"), raw.get("bake")
    if not isinstance(image, dict) or image.keys() != {"base", "target"}:
        raise _bad(path, "its table [image] does not have just `base` and `target`")
    if not all(isinstance(value, str) and value for value in image.values()):
        raise _bad(path, "the base and the target are names of images")
    if not isinstance(tables, list) or not tables:
        raise _bad(path, "it has no table [[bake]]")
    bakes = tuple(bake for table in tables for bake in _bakes(path, table))
    if len({bake.name for bake in bakes}) != len(bakes):
        raise _bad(path, "two of its bakes are for one variant, GPU and profile")
    return Matrix(base=image["base"], target=image["target"], bakes=bakes)


def to_toml(matrix: Matrix) -> str:
    """A matrix as text that `read` understands, a table for each bake; clips stand there as they are named."""

    def text(value: str) -> str:
        # A string of JSON is one of TOML, but for a delete character, which no name has.
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


def _bakes(path: Path, raw: Any) -> list[Bake]:
    if not isinstance(raw, dict):
        raise _bad(path, "a [[bake]] is no table")
    if extra := raw.keys() - {one.name for one in fields(_Table)}:
        raise _bad(path, f"a [[bake]] has the key {min(extra)!r}")
    table = _Table(**raw)
    _check(path, "variants", table.variants, VARIANTS)
    _check(path, "profiles", table.profiles, PROFILES)
    _check(path, "t3_dtype", [table.t3_dtype], T3_DTYPES)
    _check(path, "gpus", table.gpus, None)
    if not isinstance(table.levels, str):
        raise _bad(path, f'levels is {table.levels!r}, and no text as in "1,2,3"')
    if not isinstance(table.voices, dict) or not all(isinstance(clip, str) for clip in table.voices.values()):
        raise _bad(path, "voices is no table of names and clips")
    voices = {check_voice_name(name): path.parent / clip for name, clip in table.voices.items()}
    return [
        Bake(variant=variant, gpu=gpu, profile=profile, t3_dtype=table.t3_dtype, levels=table.levels, voices=voices)
        for variant, gpu, profile in product(table.variants, table.gpus or [""], table.profiles)
    ]


def _check(path: Path, name: str, values: Any, known: Any) -> None:
    """Make sure that a key is a list of known texts."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _bad(path, f"{name} is {values!r}, and no list of texts")
    if known is not None and (unknown := [value for value in values if value not in known]):
        raise _bad(path, f"{name} names {unknown[0]!r}; there are: {', '.join(known)}")


def _bad(path: Path, why: str) -> BadInputError:
    return BadInputError(
        f"{path} is no matrix of bakes: {why}", next_step="see the section on clusters in docs/images.md"
    )
