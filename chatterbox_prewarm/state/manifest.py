"""The manifest of a warm state: what is in it, what it was made from, and the digest of every file.

Compiled caches are code, so a start compares the digest of every file of a warm state with the manifest before it
opens the file. Equal manifests have equal bytes, and reading a written manifest gives the same manifest. The text
contains a digest of itself, so that a change of any byte is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from chatterbox_prewarm.errors import BadInputError, IntegrityError
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.system.digests import FileEntry, hash_file, set_digest, walk_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chatterbox_prewarm.weights.record import WeightsRecord

SCHEMA_VERSION = 5
MANIFEST_NAME = "manifest.json"
#: The types of a dataclass's fields; Python evaluates the annotations anew in every call.
_type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
#: What a provenance says where nobody told; all that is known of states before schema 4.
UNKNOWN = "not recorded"
_REBAKE = "bake the warm state again with `chatterbox-prewarm bake`"


@dataclass(frozen=True, kw_only=True)
class FamilyEntry:
    """One cache family as baked.

    `requires` maps the facts that this family's reuse depends on to the values they had at bake. `seconds_spent` is
    what the bake paid for it, `seconds_saved` what a start is spared: the cold cost less the cost of loading it.
    """

    name: str
    requires: dict[str, str]
    files: tuple[FileEntry, ...]
    seconds_spent: float
    seconds_saved: float

    @property
    def size(self) -> int:
        """Size of all the family's files in bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Which checkpoint the state was made with: its origin and the digest over its files."""

    repository: str
    revision: str
    set_digest: str
    files: tuple[FileEntry, ...]

    @classmethod
    def from_record(cls, record: WeightsRecord) -> WeightsEntry:
        """Make the entry of a recorded checkpoint."""
        return cls(
            repository=record.repository, revision=record.revision, set_digest=record.set_digest, files=record.files
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A synthesis of the bake's own, that a proof repeats: the same inputs must give the same samples.

    `tokens_sha256` is over the speech tokens as little-endian int64, `pcm_sha256` over the watermarked audio as
    16-bit little-endian PCM; the first tells T3's part of a difference from S3Gen's.
    """

    text: str
    voice: str
    seed: int
    max_new_tokens: int
    threads: int
    device: str
    sample_rate: int
    samples: int
    tokens_sha256: str
    pcm_sha256: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How the state was made, as far as the rest of the manifest does not say; the questions are those of SLSA.

    The builder's machine is the fingerprint, its time `created`, the weights have their own entry.

    Attributes:
        source: SHA-256 over this package's sources as the bake ran them, see `fingerprint.package_digest`.
        packages: SHA-256 over the lines `name==version` of every Python package that was installed.
        revision: of the sources in version control, as the builder was told.
        base_image: digest of the image that the bake ran in, as the builder was told.
        builder: what ran the bake, such as the URL of a CI job, as the builder was told.
        parameters: of the bake by name; a voice's is the digest of its clip.
    """

    source: str = UNKNOWN
    packages: str = UNKNOWN
    revision: str = UNKNOWN
    base_image: str = UNKNOWN
    builder: str = UNKNOWN
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What starts took on the machine of the bake; 0 where nobody measured it, as before schema 5.

    Attributes:
        cold_seconds: from exec to attached without a state, with what such a start would compile while it speaks.
        ready_seconds: from exec to ready with the state.
        resident_bytes: most resident memory of a process that started cold and warmed up whole.
        device_bytes: most that torch's allocator held of the GPU's memory in that process; 0 on a CPU.
    """

    cold_seconds: float = 0.0
    ready_seconds: float = 0.0
    resident_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a start needs to know before it opens a file of the warm state."""

    schema: int = SCHEMA_VERSION
    tool: str
    created: str
    variant: str
    execution: Execution
    levels: tuple[int, ...]
    warmup_texts: tuple[str, ...]
    weights: WeightsEntry
    fingerprint: dict[str, str]
    families: tuple[FamilyEntry, ...]
    voices: tuple[str, ...]
    reference: Reference
    provenance: Provenance
    measured: Measurements = field(default_factory=Measurements)
    set_digest: str = field(default="")

    def family(self, name: str) -> FamilyEntry | None:
        """The family of that name, or None when it was not baked."""
        return next((family for family in self.families if family.name == name), None)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of all families."""
        return tuple(file for family in self.families for file in family.files)


def write_manifest(manifest: Manifest, root: Path) -> None:
    """Write `manifest.json` into `root` atomically and durably: all of it or nothing of it is ever seen."""
    target = root / MANIFEST_NAME
    temporary = root / f".{MANIFEST_NAME}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(manifest_to_json(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.chmod(0o444)
    temporary.replace(target)


def manifest_to_json(manifest: Manifest) -> str:
    """The manifest as JSON text, keys sorted, with the digest of all else in it."""
    return _sealed(asdict(manifest))


def _sealed(raw: Mapping[str, Any]) -> str:
    """The text of a manifest's fields, with the digest of them; fields of an older schema keep theirs."""
    return _dump({**raw, "digest": hashlib.sha256(_dump(raw).encode()).hexdigest()})


def _dump(raw: Mapping[str, Any]) -> str:
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(root: Path) -> Manifest:
    """Read the manifest of the warm state in `root`.

    Raises:
        IntegrityError: there is none, it is not JSON, it is of a newer schema, or it was changed.
    """
    path = root / MANIFEST_NAME
    try:
        text = path.read_bytes().decode("utf-8")  # `read_text` would take one kind of line end for another
    except FileNotFoundError as error:
        raise IntegrityError(f"{root} holds no {MANIFEST_NAME}, so it is no warm state", next_step=_REBAKE) from error
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}", next_step=_REBAKE) from error
    return manifest_from_json(text, source=str(path))


def manifest_digest(root: Path) -> str:
    """SHA-256 in hexadecimal of the `manifest.json` in `root`, which names the state as a whole.

    It is over the bytes, whatever they say: nothing needs to be parsed to compare it, and `sha256sum` gives the same.
    The set digest covers the files alone; this one all that the manifest says of them.

    Raises:
        IntegrityError: there is no manifest, or it cannot be read.
    """
    try:
        return hash_file(root / MANIFEST_NAME)
    except FileNotFoundError as error:
        raise IntegrityError(f"{root} holds no {MANIFEST_NAME}, so it is no warm state", next_step=_REBAKE) from error
    except OSError as error:
        raise IntegrityError(f"{root / MANIFEST_NAME} cannot be read: {error}", next_step=_REBAKE) from error


def manifest_from_json(text: str, *, source: str) -> Manifest:
    """Parse a manifest; `source` names it in errors.

    Raises:
        IntegrityError: as for `read_manifest`.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, brackets without end
        raise IntegrityError(f"{source} is not JSON: {error}", next_step=_REBAKE) from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise IntegrityError(f"{source} names no schema version (found {schema!r})", next_step=_REBAKE)
    if schema > SCHEMA_VERSION:
        raise IntegrityError(
            f"{source} is of schema {schema}; this version reads up to {SCHEMA_VERSION}",
            next_step="upgrade chatterbox-prewarm, or bake with this version",
        )
    try:
        manifest = _build(raw)
        expected = set_digest(manifest.files)
        own = {key: value for key, value in raw.items() if key != "digest"}
        changed = schema >= 3 and text != _sealed(own)  # schemas 1 and 2 had no digest of themselves
    except (KeyError, TypeError, ValueError, AttributeError, BadInputError) as error:
        raise IntegrityError(
            f"{source} does not have the fields of schema {schema}: {error!r}", next_step=_REBAKE
        ) from error
    if manifest.set_digest != expected:
        raise IntegrityError(
            f"{source}: the set digest is {manifest.set_digest}, but its own list of files gives {expected}",
            next_step=_REBAKE,
        )
    if changed:
        raise IntegrityError(f"{source} was changed after it was written: its digest is another", next_step=_REBAKE)
    return manifest


def _build(raw: Mapping[str, Any]) -> Manifest:
    weights = raw["weights"]
    raw = {key: value for key, value in raw.items() if key != "digest" or raw["schema"] < 3}
    if raw["schema"] == 1:  # before there was anything to compile
        raw["execution"] = {"profile": raw.pop("profile")}
    if raw["schema"] < 4:
        raw["provenance"] = {}
    if raw["schema"] < 5:
        raw["measured"] = {}
    raw["schema"] = SCHEMA_VERSION
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
    return manifest


def _check_types(record: Any) -> None:
    """Make sure that every field of a dataclass is of the type that it is declared with.

    Raises:
        TypeError: naming the first one that is not.
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
    """Each family once, its files in its own folder: one that is verified must be all that is read for it."""
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


def check_layout(manifest: Manifest, root: Path) -> None:
    """Refuse anything in `root` that the manifest does not list, links, and paths that others may write.

    Whole-state rules, checked before any single digest: an extra file means that somebody else wrote here.

    Raises:
        IntegrityError: naming the first offending path.
    """
    expected = {file.path for file in manifest.files} | {MANIFEST_NAME}
    found = set(walk_files(root, root))
    parents = {str(parent) for name in found | expected for parent in PurePosixPath(name).parents}
    for place, _, _ in os.walk(root):
        if (folder := Path(place).relative_to(root).as_posix()) not in parents | {"."}:
            raise IntegrityError(f"{root} holds a folder without files: {folder}", next_step=f"remove it, or {_REBAKE}")
    if extra := sorted(found - expected):
        raise IntegrityError(
            f"{root} holds {len(extra)} file(s) that its manifest does not list, the first: {extra[0]}",
            next_step=f"remove them, or {_REBAKE}",
        )
    directories = {root, *(root / parent for path in found for parent in PurePosixPath(path).parents)}
    for path in (*sorted(directories), *(root / name for name in sorted(found))):
        if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise IntegrityError(
                f"{path} can be written by other users; compiled caches are code", next_step=f"chmod go-w {path}"
            )
