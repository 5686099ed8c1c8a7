"""Download the published weights of a variant at a pinned commit."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, WeightsError, from_os_error
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.system.regular_files import read_regular
from chatterbox_prewarm.weights.archive import fetch_archive
from chatterbox_prewarm.weights.pickles import SOURCE, convert_pickle
from chatterbox_prewarm.weights.record import RECORD_NAME, WeightsRecord, read_record, record
from chatterbox_prewarm.weights.safetensors_header import FETCH_AGAIN, read_metadata, read_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.weights.variants import Variant


logger = logging.getLogger(__name__)

#: Errors of the storage. Errors of the network are OSErrors too.
_STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})


_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_commit(text: str) -> None:
    """Check that a revision of the hub is a full commit hash.

    Raises:
        BadInputError: it is something else.
    """
    if not _COMMIT.fullmatch(text):
        raise BadInputError(
            f"the revision {text!r} is not a full commit hash, and branches move",
            next_step="give the 40 hexadecimal digits of a commit with --revision",
        )


def fetch(
    directory: Path, *, variant: Variant, revision: str | None = None, say: Callable[[str], None] = logger.info
) -> WeightsRecord:
    """Download the files of a variant at a pinned commit, compare them with the digests of the hub, and record them.

    The client of the hub shows progress and resumes a broken transfer. A second call keeps complete files and downloads
    an incomplete file again from its beginning. A checkpoint of another origin is never replaced.

    Args:
        directory: where the files are written.
        variant: the model variant.
        revision: a full commit hash; by default that of the variant. Branches and tags are refused, because they move.
        say: called with one line for each file.

    Raises:
        BadInputError: `revision` is not a commit hash, or `directory` is not writable or holds another checkpoint.
        WeightsError: the hub cannot be reached, lacks a file, or sends other bytes than it announces.
    """
    commit = revision or variant.revision
    check_commit(commit)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "creating the weights directory") from error
    fetched = _fetched_before(directory, variant)
    unpacked = {path for archive in variant.archives for path in archive.files}  # these have digests of their own
    wanted = [name for name in variant.files if name not in unpacked]
    if foreign := [name for name in wanted if (directory / name).exists() and name not in fetched]:
        raise BadInputError(
            f"{directory / foreign[0]} is not of {variant.repository}, and fetching would replace it",
            next_step="name another directory, or remove the file",
        )
    converted = _recorded_digests(directory)
    for name in wanted:
        say(f"fetching {name} of {variant.repository}")
        if name in variant.published:
            _fetch_pickle(directory, name, variant, commit, converted.get(name))
        else:
            _fetch_file(directory, name, variant, commit)
    for archive in variant.archives:
        say(f"fetching {archive.path}")
        fetch_archive(directory, archive)
    for leftover in (directory / ".cache" / "huggingface").rglob("*.incomplete"):
        leftover.unlink(missing_ok=True)  # of a killed call; the client never resumes them
    say("recording the digests")
    return record(directory, variant=variant, repository=variant.repository, revision=commit)


def _fetch_file(directory: Path, name: str, variant: Variant, commit: str) -> None:
    """Download a file unless it is there with the digest that the hub announces.

    Raises:
        BadInputError: the file cannot be written.
        WeightsError: the file cannot be downloaded, or has another digest than announced.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    # HTTPError is the base class of network errors in the HTTP client of the hub: httpx, or httpx2 since version 2.
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    path = directory / name
    try:
        # The download itself compares only sizes, so ask the hub for the digest.
        announced = get_hf_file_metadata(hf_hub_url(variant.repository, name, revision=commit))
        if path.is_file() and _differs_from_etag(path, announced.etag) is None:
            return
        (directory / RECORD_NAME).unlink(missing_ok=True)  # it is wrong until it is written again
        path.unlink(missing_ok=True)
        hf_hub_download(variant.repository, name, revision=commit, local_dir=directory)
        if problem := _differs_from_etag(path, announced.etag):
            path.unlink()
            raise WeightsError(f"{name} of {variant.repository}: {problem}", next_step=FETCH_AGAIN)
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            raise from_os_error(error, f"writing {name}") from error
        raise _not_fetched(name, variant, commit, error) from error


def _fetch_pickle(directory: Path, name: str, variant: Variant, commit: str, recorded: str | None) -> None:
    """Download a pickle of tensors, and convert it to the safetensors file `name`, unless that was done before.

    Args:
        directory: of the checkpoint.
        name: of the converted file.
        variant: has the name of the published file.
        commit: the revision.
        recorded: the digest of the converted file in the record of an earlier call.

    Raises:
        BadInputError, WeightsError: as `_fetch_file` and `convert_pickle`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    published = variant.published[name]
    try:
        etag = get_hf_file_metadata(hf_hub_url(variant.repository, published, revision=commit)).etag
    except (HTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise _not_fetched(published, variant, commit, error) from error
    if _is_converted(directory / name, etag, recorded):
        (directory / published).unlink(missing_ok=True)  # of a call that was killed after the conversion
        return
    (directory / RECORD_NAME).unlink(missing_ok=True)
    _fetch_file(directory, published, variant, commit)
    convert_pickle(directory / published, directory / name, {SOURCE: etag or ""})
    (directory / published).unlink()


def _is_converted(path: Path, etag: str | None, recorded: str | None) -> bool:
    """Return whether a file is complete, was converted from this pickle, and still has its recorded digest."""
    try:
        if read_metadata(path).get(SOURCE) != etag:
            return False
        read_safetensors_header(path)
    except (OSError, WeightsError):
        return False
    return recorded is None or hash_file(path) == recorded


def _recorded_digests(directory: Path) -> dict[str, str]:
    """Return the digests in the record of an earlier call, by the name of the file."""
    if not (directory / RECORD_NAME).exists():
        return {}
    return {entry.path: entry.sha256 for entry in read_record(directory).files}


def _not_fetched(name: str, variant: Variant, commit: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"{name} of {variant.repository} at {commit[:12]} could not be fetched: {error}",
        next_step="check the network and run the same command again: it keeps complete files",
    )


def _fetched_before(directory: Path, variant: Variant) -> frozenset[str]:
    """List the files that came from the hub, according to the record or else to the metadata of the hub's client."""
    if (directory / RECORD_NAME).exists():
        recorded = read_record(directory)
        same = (recorded.repository, recorded.variant) == (variant.repository, variant.name)
        return frozenset(variant.files) if same else frozenset()
    metadata = (directory / ".cache" / "huggingface" / "download").rglob("*.metadata")
    names = {path.name.removesuffix(".metadata") for path in metadata}
    return frozenset(names | {name for name, published in variant.published.items() if published in names})


def _differs_from_etag(path: Path, etag: str | None) -> str | None:
    """Compare a file with the ETag of the hub: a SHA-256 for a large file, the SHA-1 of the Git blob for a small one.

    Returns:
        the difference in words, or None.
    """
    if etag is None:
        return "the hub announces no digest for it"
    if len(etag) == 64:
        digest = hash_file(path)
    elif len(etag) == 40:
        data = read_regular(path, follow_links=True)
        digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    else:
        return f"the hub announces no digest for it (ETag {etag!r})"
    return None if digest == etag else f"the hub announced digest {etag}, the received file has {digest}"
