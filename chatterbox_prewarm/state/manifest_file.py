"""Read and write manifests.

Equal manifests have equal bytes, and reading a written manifest gives the same manifest. Since schema 3 the text
contains a digest of itself, so that a change of any byte is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.model.text import check_text, check_voice_name
from chatterbox_prewarm.state.manifest import (
    FIRST_SEALED_SCHEMA,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FamilyEntry,
    Manifest,
    Measurements,
    Provenance,
    Reference,
    WeightsEntry,
)
from chatterbox_prewarm.system.atomic_files import write_whole
from chatterbox_prewarm.system.digests import FileEntry, set_digest
from chatterbox_prewarm.system.limits import MAX_SEED, MIN_TOKENS
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

BAKE_AGAIN = "bake the warm state again with `chatterbox-prewarm bake`"
#: Maximum size. A manifest of ten thousand files has 2 MB, and parsing one takes about a second for each megabyte.
_MAX_BYTES = 4 << 20
#: A text has at most about one token per character. Together with the limit of `max_new_tokens` below, a reference fits
#: into T3's KV cache, and a start never fails because it does not.
MAX_REFERENCE_CHARACTERS = 1000
#: Minimum and maximum of the numbers in a reference.
_REFERENCE_LIMITS = {
    "seed": (0, MAX_SEED),
    "max_new_tokens": (MIN_TOKENS, 1000),
    "threads": (1, 1 << 16),
    "sample_rate": (1, 1 << 20),
    "samples": (0, 1 << 40),
}
#: Types of a dataclass's fields. Cached, because Python evaluates the annotations in every call.
_type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def write_manifest(manifest: Manifest, root: Path) -> None:
    """Write `manifest.json` into `root`, atomically and durably."""
    write_whole(root / MANIFEST_NAME, manifest_to_json(manifest), mode=0o444, durable=True)


def manifest_to_json(manifest: Manifest) -> str:
    """Return the manifest as JSON text with sorted keys and the digest of all other fields."""
    return _seal({**asdict(manifest), "schema": SCHEMA_VERSION})


def _seal(raw: Mapping[str, Any]) -> str:
    """Return the JSON text of a manifest's fields together with their digest."""
    return _dump({**raw, "digest": hashlib.sha256(_dump(raw).encode()).hexdigest()})


def _dump(raw: Mapping[str, Any]) -> str:
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest_bytes(root: Path) -> bytes:
    """Read `manifest.json` in `root` without parsing it.

    Raises:
        IntegrityError: the file is missing, is not a regular file, is too large, or cannot be read.
    """
    try:
        return read_regular(root / MANIFEST_NAME, limit=_MAX_BYTES)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{root} has no {MANIFEST_NAME}, so it is not a warm state", next_step=BAKE_AGAIN
        ) from error
    except OSError as error:
        raise IntegrityError(
            f"{root / MANIFEST_NAME} cannot be read: {error.strerror}", next_step=BAKE_AGAIN
        ) from error


def parse_manifest(data: bytes, *, source: str) -> Manifest:
    """Parse a manifest.

    Args:
        data: the bytes of `manifest.json`.
        source: the name of the file in error messages.

    Raises:
        IntegrityError: it is not JSON, has a newer schema or invalid fields, or was changed after it was written.
    """
    try:
        text = data.decode("utf-8")
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers with thousands of digits, and endless brackets
        raise IntegrityError(f"{source} is not JSON: {error}", next_step=BAKE_AGAIN) from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise IntegrityError(f"{source} has no schema version (found {schema!r})", next_step=BAKE_AGAIN)
    if schema > SCHEMA_VERSION:
        raise IntegrityError(
            f"{source} has schema {schema}; this version reads schemas up to {SCHEMA_VERSION}",
            next_step="upgrade chatterbox-prewarm, or bake with this version",
        )
    try:
        manifest = _build(raw)
        expected = set_digest(manifest.files)
        sealed_fields = {key: value for key, value in raw.items() if key != "digest"}
        changed = schema >= FIRST_SEALED_SCHEMA and text != _seal(sealed_fields)
    except (KeyError, TypeError, ValueError, AttributeError, BadInputError) as error:
        raise IntegrityError(
            f"{source} does not have the fields of schema {schema}: {error!r}", next_step=BAKE_AGAIN
        ) from error
    if manifest.set_digest != expected:
        raise IntegrityError(
            f"{source}: the set digest is {manifest.set_digest}, but the listed files give {expected}",
            next_step=BAKE_AGAIN,
        )
    if changed:
        raise IntegrityError(f"{source} was changed after it was written: its digest differs", next_step=BAKE_AGAIN)
    return manifest


def _build(raw: Mapping[str, Any]) -> Manifest:
    """Build a manifest from the fields of any known schema."""
    weights = raw["weights"]
    raw = {key: value for key, value in raw.items() if key != "digest" or raw["schema"] < 3}
    if raw["schema"] == 1:  # nothing was compiled then
        raw["execution"] = {"profile": raw.pop("profile")}
    if raw["schema"] < 4:
        raw["provenance"] = {}
    if raw["schema"] < 5:
        raw["measured"] = {}
    manifest = Manifest(
        **{
            **raw,
            "execution": Execution(**raw["execution"]),
            "levels": tuple(raw["levels"]),
            "warmup_texts": tuple(raw["warmup_texts"]),
            "voices": tuple(raw["voices"]),
            "weights": WeightsEntry(**{**weights, "files": _files(weights["files"])}),
            "families": _families(raw["families"]),
            "reference": Reference(**raw["reference"]),
            "provenance": Provenance(**raw["provenance"]),
            "measured": Measurements(**raw["measured"]),
        }
    )
    _check_types(manifest)
    _check_reference(manifest)
    return manifest


def _check_reference(manifest: Manifest) -> None:
    """Check that a start can speak the reference synthesis, so that no start fails because of it.

    Raises:
        BadInputError, ValueError: the message names the field.
    """
    reference = manifest.reference
    check_text(reference.text, limit=MAX_REFERENCE_CHARACTERS)
    check_voice_name(reference.voice)
    if reference.voice not in {DEFAULT_VOICE, *manifest.voices}:
        raise ValueError(f"the reference has the voice {reference.voice!r}, which the state does not have")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", reference.device):
        raise ValueError(f"the reference has the unknown device {reference.device!r}")
    spoken = bool(reference.samples and reference.tokens_sha256 and reference.pcm_sha256)
    if spoken == manifest.cross_compiled:
        raise ValueError("the reference has audio exactly if the state was baked on its device")
    for name, (lowest, highest) in _REFERENCE_LIMITS.items():
        if not lowest <= (value := getattr(reference, name)) <= highest:
            raise ValueError(f"{name} of the reference is {value}, not a number from {lowest} to {highest}")


def _check_types(record: Any) -> None:
    """Check that every field of a dataclass has its declared type.

    Raises:
        TypeError: naming the first field with another type.
    """
    for name, kind in _type_hints(type(record)).items():
        value = getattr(record, name)
        values, kinds = [value], {int, float} if kind is float else {kind}
        if get_origin(kind) is tuple:
            values, kinds = list(value), {get_args(kind)[0]}
        elif get_origin(kind) is dict:
            values, kinds = [*value.keys(), *value.values()], set(get_args(kind))
        for item in values:
            if is_dataclass(item):
                _check_types(item)
            elif type(item) not in kinds:
                raise TypeError(f"{name} holds {item!r}")


def _families(raw: Sequence[Mapping[str, Any]]) -> tuple[FamilyEntry, ...]:
    """Parse the families. Each has a separate folder, so that verifying a family covers all files that it reads."""
    families = tuple(FamilyEntry(**{**entry, "files": _files(entry["files"])}) for entry in raw)
    if len({family.name for family in families}) != len(families):
        raise ValueError("a family is listed twice")
    for family in families:
        if stray := [file.path for file in family.files if PurePosixPath(file.path).parts[:1] != (family.name,)]:
            raise ValueError(f"the file {stray[0]!r} is not in the folder of its family {family.name}")
    return families


def _files(raw: Sequence[Mapping[str, Any]]) -> tuple[FileEntry, ...]:
    entries = tuple(FileEntry(**entry) for entry in raw)
    for entry in entries:
        path = PurePosixPath(entry.path)
        if path.is_absolute() or ".." in path.parts or "\0" in entry.path:
            raise ValueError(f"the path {entry.path!r} leaves the warm state")
    return entries
