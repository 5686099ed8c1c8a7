"""Checkpoints on disk: the pinned download, the record of what was fetched, and its verification.

A weights directory holds the variant's files and `weights.json`, our record of where they came from and of their
digests. The record is written last, so a directory without one was never complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from chatterbox_prewarm.errors import BadInputError, WeightsError, from_os_error
from chatterbox_prewarm.manifest import FileEntry, WeightsEntry, hash_file, set_digest, verify_files
from chatterbox_prewarm.models import VARIANTS, Variant, get_variant

if TYPE_CHECKING:
    from pathlib import Path

RECORD_NAME = "weights.json"
RECORD_SCHEMA = 1
_SMALL = 1 << 20
#: Faults of the place that is written to, apart from those of the network, which are OSErrors as well.
_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: How a pickle of protocol 2 to 5 begins, and a zip archive of torch's. So may the length of a safetensors header.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
#: Bytes of a number of each dtype that safetensors has.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_FETCH = "fetch them again with `chatterbox-prewarm weights fetch`"


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A checkpoint of random weights: how it was made, and how many layers each shortened stack has.

    `None` for a stack means the full depth, as published.
    """

    size: str
    seed: int
    t3_layers: int | None = None
    s3gen_blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """`weights.json`: the origin and the digests of a checkpoint."""

    schema: int = RECORD_SCHEMA
    variant: str
    repository: str
    revision: str
    synthetic: Synthetic | None
    files: tuple[FileEntry, ...]

    @property
    def set_digest(self) -> str:
        """One digest for the whole checkpoint."""
        return set_digest(self.files)

    def entry(self) -> WeightsEntry:
        """The record as a manifest keeps it."""
        return WeightsEntry(
            repository=self.repository, revision=self.revision, set_digest=self.set_digest, files=self.files
        )


def fetch(directory: Path, *, variant: Variant, revision: str | None = None) -> WeightsRecord:
    """Download a variant's files at a pinned commit, verify them against the hub's own digests, and record them.

    The hub's client shows progress and resumes a transfer that breaks. Another call keeps the files that an earlier one
    finished, and fetches the one that it was interrupted in from its beginning. A checkpoint of another origin is left
    alone.

    Args:
        directory: where the files go.
        variant: which model.
        revision: a full commit hash; the variant's pinned one by default. Branches and tags move, so they are refused.

    Raises:
        BadInputError: `revision` is no commit hash, or `directory` cannot be written, or holds another checkpoint.
        WeightsError: the hub cannot be reached, lacks a file, or sent something else than it announced.
    """
    import httpx
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    commit = revision or variant.revision
    if not _COMMIT.fullmatch(commit):
        raise BadInputError(
            f"the revision {commit!r} is not a full commit hash, and branches move",
            next_step="give the 40 hexadecimal digits of a commit with --revision",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "making the weights directory") from error
    ours = _fetched_before(directory, variant)
    if foreign := [name for name in variant.files if (directory / name).exists() and name not in ours]:
        raise BadInputError(
            f"{directory / foreign[0]} is not of {variant.repository}, and fetching would replace it",
            next_step="name another directory, or remove the file",
        )
    for name in variant.files:
        try:
            # A fresh look at what the hub announces: the download itself compares sizes, never digests.
            announced = get_hf_file_metadata(hf_hub_url(variant.repository, name, revision=commit))
            path = directory / name
            if path.is_file() and _differs_from_etag(path, announced.etag) is None:
                continue
            # From here on the record is no longer true, until it is written anew.
            (directory / RECORD_NAME).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            hf_hub_download(variant.repository, name, revision=commit, local_dir=directory)
            if problem := _differs_from_etag(path, announced.etag):
                path.unlink()
                raise WeightsError(f"{name} of {variant.repository}: {problem}", next_step=_FETCH)
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno in _STORAGE:
                raise from_os_error(error, f"writing {name}") from error
            raise WeightsError(
                f"{name} of {variant.repository} at {commit[:12]} could not be fetched: {error}",
                next_step="check the network and run the same command again: it keeps the files that are complete",
            ) from error
    for leftover in (directory / ".cache" / "huggingface").rglob("*.incomplete"):
        leftover.unlink(missing_ok=True)  # of a call that was killed; the client never takes one up again
    return record(directory, variant=variant, repository=variant.repository, revision=commit)


def _fetched_before(directory: Path, variant: Variant) -> frozenset[str]:
    """The files in `directory` that came from the hub: by our record, or where there is none, by its client's notes."""
    if (directory / RECORD_NAME).exists():
        known = read_record(directory)
        return frozenset(variant.files) if known.repository == variant.repository else frozenset()
    notes = (directory / ".cache" / "huggingface" / "download").rglob("*.metadata")
    return frozenset(path.name.removesuffix(".metadata") for path in notes)


def _differs_from_etag(path: Path, etag: str | None) -> str | None:
    """Compare a file with the hub's tag: SHA-256 for a large file, the Git blob's SHA-1 for a small one."""
    if etag is None:
        return "the hub names no digest for it"
    if len(etag) == 64:
        found = hash_file(path)
    elif len(etag) == 40:
        data = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    else:
        return f"the hub names no digest for it (tag {etag!r})"
    return None if found == etag else f"the hub announced digest {etag}, the file received has {found}"


def record(
    directory: Path, *, variant: Variant, repository: str, revision: str, synthetic: Synthetic | None = None
) -> WeightsRecord:
    """Hash the variant's files in `directory` and write `weights.json`; for a checkpoint of one's own as well.

    Raises:
        WeightsError: a file is missing or is not what its name promises.
    """
    files = []
    for name in variant.files:
        path = directory / name
        if not path.is_file():
            if name == variant.builtin_voice:
                continue  # a fine-tune may ship no voice: bake makes one
            raise WeightsError(f"{path} is missing", next_step=_FETCH)
        if name in variant.safetensors:
            read_safetensors_header(path)
        files.append(FileEntry(path=name, size=path.stat().st_size, sha256=hash_file(path)))
    made = WeightsRecord(
        variant=variant.name, repository=repository, revision=revision, synthetic=synthetic, files=tuple(files)
    )
    temporary = directory / f".{RECORD_NAME}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(asdict(made), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(directory / RECORD_NAME)
    except OSError as error:
        raise from_os_error(error, f"writing {RECORD_NAME}") from error
    return made


def read_record(directory: Path) -> WeightsRecord:
    """Read `weights.json`.

    Raises:
        WeightsError: there is no such directory or record, or it cannot be parsed.
    """
    path = directory / RECORD_NAME
    if not directory.is_dir():
        raise WeightsError(f"there is no weights directory {directory}", next_step=_FETCH)
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != RECORD_SCHEMA:
            raise WeightsError(
                f"{path} is of schema {raw['schema']}; this version reads {RECORD_SCHEMA}",
                next_step="upgrade chatterbox-prewarm, or run `chatterbox-prewarm weights record`",
            )
        synthetic = raw["synthetic"]
        if raw["variant"] not in VARIANTS:
            raise WeightsError(
                f"{path} is of the variant {raw['variant']!r}; this version knows {', '.join(VARIANTS)}",
                next_step="upgrade chatterbox-prewarm, or run `chatterbox-prewarm weights record`",
            )
        return WeightsRecord(
            **{
                **raw,
                "synthetic": None if synthetic is None else Synthetic(**synthetic),
                "files": tuple(FileEntry(**entry) for entry in raw["files"]),
            }
        )
    except FileNotFoundError:
        raise WeightsError(
            f"{directory} has no {RECORD_NAME}: the download never finished, or the checkpoint is your own",
            next_step=f"{_FETCH}, or record your own with `chatterbox-prewarm weights record {directory}`",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error!r}", next_step=_FETCH) from error


def check_quickly(directory: Path, found: WeightsRecord) -> None:
    """Compare what a start can afford with the record: the size of every file, the digest of all but large tensors.

    `verify` compares all digests, which takes seconds.

    Raises:
        WeightsError: naming the first file that is missing or differs.
    """
    for entry in found.files:
        try:
            size = (directory / entry.path).stat().st_size
        except OSError as error:
            raise WeightsError(f"{directory / entry.path}: {error.strerror}", next_step=_FETCH) from error
        if size != entry.size:
            raise WeightsError(
                f"{directory / entry.path} is truncated or was changed: {entry.size} bytes recorded, {size} found",
                next_step=_FETCH,
            )
    small = [entry for entry in found.files if entry.size <= _SMALL or not entry.path.endswith(".safetensors")]
    if problems := verify_files(small, directory):
        raise WeightsError(f"the weights in {directory} differ from their record: {problems[0]}", next_step=_FETCH)


def verify(directory: Path) -> WeightsRecord:
    """Verify every file of a checkpoint against its record, digests and all.

    Raises:
        WeightsError: naming everything that differs.
    """
    found = read_record(directory)
    variant = get_variant(found.variant)
    recorded = {file.path for file in found.files}
    if unrecorded := sorted(set(variant.files) - {variant.builtin_voice} - recorded):
        raise WeightsError(f"{directory / RECORD_NAME} does not record {unrecorded[0]}", next_step=_FETCH)
    for name in variant.safetensors:
        if (directory / name).is_file():
            read_safetensors_header(directory / name)
    if problems := verify_files(found.files, directory):
        raise WeightsError(
            f"the weights in {directory} differ from their record: {'; '.join(problems)}", next_step=_FETCH
        )
    return found


def read_safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read the header of a safetensors file: the dtype and shape of each tensor.

    Raises:
        WeightsError: the file is a pickle, truncated, or no safetensors file at all.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            shapes, _, promised = parse_safetensors_header(stream, size)
        except ValueError as error:
            stream.seek(0)
            if stream.read(8).startswith(_PICKLES):
                raise WeightsError(
                    f"{path} is a pickle where safetensors belong; loading one runs whatever code is in it",
                    next_step="convert it with safetensors, or fetch the published safetensors file",
                ) from error
            raise WeightsError(f"{path} is not a safetensors file: {error!r}", next_step=_FETCH) from error
    if promised != size:
        raise WeightsError(
            f"{path} is truncated: its header promises {promised} bytes, {size} are there", next_step=_FETCH
        )
    return shapes


def parse_safetensors_header(
    stream: BinaryIO, size: int
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str], int]:
    """Read the header of safetensors from a stream at its beginning.

    The format is an 8-byte little-endian header length, that many bytes of JSON, then the data.

    Args:
        stream: read up to the end of the header.
        size: of all that the stream holds, in bytes.

    Returns:
        the dtype and shape of each tensor, the metadata, and the size in bytes that the header promises.

    Raises:
        ValueError: it is none.
    """
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(stream.read(length))
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):  # one after the other
            first, last = entry["data_offsets"]
            if first != end or last - first != _WIDTHS[entry["dtype"]] * math.prod(entry["shape"]):
                raise ValueError(f"{entry} does not follow the {end} bytes before it, or is not as long as it says")
            end = last
        shapes = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from error
    return shapes, metadata, 8 + length + end
