"""Checkpoints on disk: the pinned download, the record of what was fetched, and its verification.

A weights directory holds the variant's files and `weights.json`, our record of where they came from and of their
digests. The record is written last, so a directory without one was never complete.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import WeightsError, from_os_error
from chatterbox_prewarm.system.digests import FileEntry, hash_file, set_digest, verify_files
from chatterbox_prewarm.weights.safetensors_header import FETCH_AGAIN, read_safetensors_header
from chatterbox_prewarm.weights.variants import VARIANTS, Variant, get_variant

if TYPE_CHECKING:
    from pathlib import Path

RECORD_NAME = "weights.json"
RECORD_SCHEMA = 1
_SMALL = 1 << 20


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
            raise WeightsError(f"{path} is missing", next_step=FETCH_AGAIN)
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
        raise WeightsError(f"there is no weights directory {directory}", next_step=FETCH_AGAIN)
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
            next_step=f"{FETCH_AGAIN}, or record your own with `chatterbox-prewarm weights record {directory}`",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error!r}", next_step=FETCH_AGAIN) from error


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
            raise WeightsError(f"{directory / entry.path}: {error.strerror}", next_step=FETCH_AGAIN) from error
        if size != entry.size:
            raise WeightsError(
                f"{directory / entry.path} is truncated or was changed: {entry.size} bytes recorded, {size} found",
                next_step=FETCH_AGAIN,
            )
    small = [entry for entry in found.files if entry.size <= _SMALL or not entry.path.endswith(".safetensors")]
    if problems := verify_files(small, directory):
        raise WeightsError(f"the weights in {directory} differ from their record: {problems[0]}", next_step=FETCH_AGAIN)


def verify(directory: Path) -> WeightsRecord:
    """Verify every file of a checkpoint against its record, digests and all.

    Raises:
        WeightsError: naming everything that differs.
    """
    found = read_record(directory)
    variant = get_variant(found.variant)
    recorded = {file.path for file in found.files}
    if unrecorded := sorted(set(variant.files) - {variant.builtin_voice} - recorded):
        raise WeightsError(f"{directory / RECORD_NAME} does not record {unrecorded[0]}", next_step=FETCH_AGAIN)
    for name in variant.safetensors:
        if (directory / name).is_file():
            read_safetensors_header(directory / name)
    if problems := verify_files(found.files, directory):
        raise WeightsError(
            f"the weights in {directory} differ from their record: {'; '.join(problems)}", next_step=FETCH_AGAIN
        )
    return found
