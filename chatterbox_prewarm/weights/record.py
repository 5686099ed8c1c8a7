"""The record of a checkpoint, and its verification.

A weights directory holds the files of a variant and `weights.json`, the record of their origin and digests. The record
is written last, so a directory without a record was never complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import WeightsError, from_os_error
from chatterbox_prewarm.system.atomic_files import write_whole
from chatterbox_prewarm.system.digests import FileEntry, hash_file, set_digest, verify_files
from chatterbox_prewarm.system.regular_files import read_regular
from chatterbox_prewarm.weights.safetensors_header import FETCH_AGAIN, read_safetensors_header
from chatterbox_prewarm.weights.variants import VARIANTS, Variant, get_variant
from chatterbox_prewarm.weights.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from pathlib import Path

RECORD_NAME = "weights.json"
RECORD_SCHEMA = 1
_SMALL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """How a checkpoint of random weights was made.

    Attributes:
        t3_layers, s3gen_blocks: the layers of each shortened stack; None for the published number.
    """

    size: str
    seed: int
    t3_layers: int | None = None
    s3gen_blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """`weights.json`: the origin and the digests of a checkpoint.

    Attributes:
        identity: the set digest from before files were replaced by files with the same tensors; "" if none were. States
            and voices belong to the tensors of a checkpoint, so they stay usable.
    """

    schema: int = RECORD_SCHEMA
    variant: str
    repository: str
    revision: str
    synthetic: Synthetic | None
    files: tuple[FileEntry, ...]
    identity: str = ""

    @property
    def set_digest(self) -> str:
        """The digest of the whole checkpoint."""
        return self.identity or set_digest(self.files)


def record(
    directory: Path,
    *,
    variant: Variant,
    repository: str,
    revision: str,
    synthetic: Synthetic | None = None,
    identity: str = "",
) -> WeightsRecord:
    """Hash the files of a variant in `directory` and write `weights.json`. Also for a checkpoint of your own.

    Raises:
        WeightsError: a file is missing or has another format.
    """
    files = []
    for name in variant.files:
        path = directory / name
        if not path.is_file():
            if name == variant.builtin_voice:
                continue  # a fine-tune may have no voice; a bake makes one then
            raise WeightsError(f"{path} is missing", next_step=FETCH_AGAIN)
        if name in variant.safetensors:
            read_safetensors_header(path)
        files.append(FileEntry(path=name, size=path.stat().st_size, sha256=hash_file(path)))
        if name == variant.t3:
            _check_t3(path, files[-1].sha256, variant)
    check_vocabulary(directory, variant)
    written = WeightsRecord(
        variant=variant.name,
        repository=repository,
        revision=revision,
        synthetic=synthetic,
        files=tuple(files),
        identity=identity,
    )
    try:
        write_whole(directory / RECORD_NAME, json.dumps(_to_json(written), indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise from_os_error(error, f"writing {RECORD_NAME}") from error
    return written


def _to_json(weights: WeightsRecord) -> dict[str, Any]:
    """Return the record as JSON. Without an identity, older versions read it too."""
    fields = asdict(weights)
    return fields if weights.identity else {name: value for name, value in fields.items() if name != "identity"}


def _check_t3(path: Path, digest: str, variant: Variant) -> None:
    """Refuse the published T3 of another variant, which may have the same shapes.

    Raises:
        WeightsError: see above.
    """
    for other in VARIANTS.values():
        if other.t3_sha256 == digest and other.name != variant.name:
            raise WeightsError(
                f"{path} is the T3 of the variant {other.name}, not of {variant.name}",
                next_step=f"use --variant {other.name}, with the file named {other.t3}",
            )


def read_record(directory: Path) -> WeightsRecord:
    """Read `weights.json`.

    Raises:
        WeightsError: there is no such directory or record, or it cannot be parsed.
    """
    path = directory / RECORD_NAME
    if not directory.is_dir():
        raise WeightsError(f"there is no weights directory {directory}", next_step=FETCH_AGAIN)
    try:
        raw: Any = json.loads(read_regular(path, follow_links=True))
        if raw["schema"] != RECORD_SCHEMA:
            raise WeightsError(
                f"{path} has schema {raw['schema']}; this version reads {RECORD_SCHEMA}",
                next_step="upgrade chatterbox-prewarm, or run `chatterbox-prewarm weights record`",
            )
        synthetic = raw["synthetic"]
        if raw["variant"] not in VARIANTS:
            raise WeightsError(
                f"{path} has the variant {raw['variant']!r}; this version knows {', '.join(VARIANTS)}",
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
        if several := sorted(path.parent for path in directory.glob(f"*/{RECORD_NAME}")):
            raise WeightsError(
                f"{directory} has {len(several)} checkpoints: {', '.join(path.name for path in several)}",
                next_step=f"name the directory of one, such as {several[0]}",
            ) from None
        raise WeightsError(
            f"{directory} has no {RECORD_NAME}: the download did not finish, or the checkpoint is your own",
            next_step=f"{FETCH_AGAIN}, or record your own with `chatterbox-prewarm weights record {directory}`",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error!r}", next_step=FETCH_AGAIN) from error


def read_variant(directory: Path) -> Variant:
    """Return the variant of a checkpoint.

    Raises:
        WeightsError: as `read_record`.
    """
    return get_variant(read_record(directory).variant)


def check_quickly(directory: Path, weights: WeightsRecord) -> None:
    """Compare the size of every file with the record, and the digests of all files except large ones with tensors.

    A start can afford this. `verify` compares all digests, which takes seconds.

    Raises:
        WeightsError: naming the first file that is missing or differs.
    """
    for entry in weights.files:
        try:
            size = (directory / entry.path).stat().st_size
        except OSError as error:
            raise WeightsError(f"{directory / entry.path}: {error.strerror}", next_step=FETCH_AGAIN) from error
        if size != entry.size:
            raise WeightsError(
                f"{directory / entry.path} is truncated or was changed: {entry.size} bytes recorded, {size} found",
                next_step=FETCH_AGAIN,
            )
    variant = get_variant(weights.variant)
    always = _always_hashed(variant)
    hashed = [entry for entry in weights.files if entry.size <= _SMALL or entry.path in always]
    if problems := verify_files(hashed, directory, follow_links=True):
        raise WeightsError(f"the weights in {directory} differ from their record: {problems[0]}", next_step=FETCH_AGAIN)
    check_vocabulary(directory, variant)


def _always_hashed(variant: Variant) -> set[str]:
    """Return the files of any size whose digests a start compares.

    The voice is a pickle, which is checked before it is read. A change in the tokenizer or in the data of a language
    gives wrong speech without an error. The published data of Multilingual has 62 MB: 1.9 MB of Cangjie codes, and 22.7
    and 37.5 MB of pkuseg's model. With the SHA instructions of the processor, two threads hash it in 37 ms.
    """
    # Nothing reads an archive after it was unpacked.
    unpacked = {path for archive in variant.archives for path in archive.files if path != archive.path}
    return {variant.builtin_voice, variant.tokenizer, *variant.data, *unpacked}


def verify(directory: Path) -> WeightsRecord:
    """Compare every file of a checkpoint with its record, including the digests.

    Raises:
        WeightsError: naming every file that differs.
    """
    weights = read_record(directory)
    variant = get_variant(weights.variant)
    recorded = {file.path for file in weights.files}
    if unrecorded := sorted(set(variant.files) - {variant.builtin_voice} - recorded):
        raise WeightsError(f"{directory / RECORD_NAME} does not record {unrecorded[0]}", next_step=FETCH_AGAIN)
    for name in variant.safetensors:
        if (directory / name).is_file():
            read_safetensors_header(directory / name)
    if problems := verify_files(weights.files, directory, follow_links=True):
        raise WeightsError(
            f"the weights in {directory} differ from their record: {'; '.join(problems)}", next_step=FETCH_AGAIN
        )
    check_vocabulary(directory, variant)
    return weights
