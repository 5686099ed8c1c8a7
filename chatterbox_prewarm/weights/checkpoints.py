"""Find the checkpoints of a weights directory, which is one checkpoint or has a directory for each variant."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.weights.record import RECORD_NAME, read_record, record
from chatterbox_prewarm.weights.safetensors_header import read_open_header
from chatterbox_prewarm.weights.variants import VARIANTS, get_variant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from chatterbox_prewarm.weights.safetensors_header import Header


def checkpoints_in(directory: Path) -> dict[str, Path]:
    """Return the path of each checkpoint by the name of its variant, in the order of the table of variants.

    Raises:
        WeightsError: there is no checkpoint, or a record cannot be read.
        BadInputError: two checkpoints are for the same variant.
    """
    if os.path.lexists(directory / RECORD_NAME) or not directory.is_dir():
        return {read_record(directory).variant: directory}
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if not os.path.lexists(path / RECORD_NAME):
            continue
        variant = read_record(path).variant
        if variant in found:
            raise BadInputError(
                f"{found[variant]} and {path} are both checkpoints of the variant {variant}",
                next_step="move one of them to another directory",
            )
        found[variant] = path
    if not found:
        return {read_record(directory).variant: directory}  # the error says what is missing
    return {name: found[name] for name in VARIANTS if name in found}


def choose_checkpoints(directory: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """Return the path of the checkpoint of each named variant, in the order of the names; of all without a name.

    Raises:
        WeightsError: a variant has no checkpoint, or as `checkpoints_in`.
        BadInputError: there is no such variant, or a name is given twice, or as `checkpoints_in`.
    """
    for name in names:
        get_variant(name)
        if names.count(name) > 1:
            raise BadInputError(f"the variant {name} is named twice", next_step="name each variant once")
    found = checkpoints_in(directory)
    for name in names:
        if name not in found:
            raise WeightsError(
                f"{directory} has no checkpoint of the variant {name}, only of: {', '.join(found)}",
                next_step=f"add it: chatterbox-prewarm weights fetch {directory / name} --variant {name}",
            )
    return {name: found[name] for name in names} if names else found


def share_files(checkpoints: Mapping[str, Path]) -> int:
    """Replace files that several checkpoints have by hard links to one file. Return the bytes that this saves.

    Files are equal if they hold the same tensors. The files of two variants may differ in their headers only. Then the
    checkpoint is recorded again, because its file has another digest now; its set digest stays.

    Args:
        checkpoints: the directory of each checkpoint by its variant, all on one file system.

    Raises:
        WeightsError: a record or a file cannot be read.
    """
    saved = 0
    kept: list[Path] = []
    for name, directory in checkpoints.items():
        entries, variant = read_record(directory), get_variant(name)
        changed = False
        for entry in entries.files:
            path = directory / entry.path
            for other in kept:
                if path.samefile(other) or not _are_equal(path, other, tensors=entry.path in variant.safetensors):
                    continue
                replacement = path.with_name(f".{path.name}.link")
                replacement.hardlink_to(other)
                replacement.replace(path)
                saved += entry.size
                changed = changed or hash_file(other) != entry.sha256
                break
            else:
                kept.append(path)
        if changed:
            record(
                directory,
                variant=variant,
                repository=entries.repository,
                revision=entries.revision,
                synthetic=entries.synthetic,
                identity=entries.set_digest,
            )
    return saved


def _are_equal(path: Path, other: Path, *, tensors: bool) -> bool:
    """Compare two files: the bytes of both, or the tensors."""
    if not tensors:
        return path.stat().st_size == other.stat().st_size and hash_file(path) == hash_file(other)
    if other.suffix != path.suffix:
        return False
    with path.open("rb") as one, other.open("rb") as two:
        first, second = read_open_header(one, path), read_open_header(two, other)
        if first.tensors != second.tensors:
            return False
        return all(_tensor(one, first, name) == _tensor(two, second, name) for name in first.tensors)


def _tensor(stream: BinaryIO, header: Header, name: str) -> bytes:
    stream.seek(header.offsets[name])
    return stream.read(header.size_of(name))
