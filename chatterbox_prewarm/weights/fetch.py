"""Download the published weights of a variant at a pinned commit."""

from __future__ import annotations

import errno
import hashlib
import re
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, WeightsError, from_os_error
from chatterbox_prewarm.system.digests import hash_file
from chatterbox_prewarm.weights.record import RECORD_NAME, WeightsRecord, read_record, record
from chatterbox_prewarm.weights.safetensors_header import FETCH_AGAIN

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.weights.variants import Variant


#: Faults of the place that is written to, apart from those of the network, which are OSErrors as well.
_STORAGE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})


_COMMIT = re.compile(r"[0-9a-f]{40}")


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
                raise WeightsError(f"{name} of {variant.repository}: {problem}", next_step=FETCH_AGAIN)
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
