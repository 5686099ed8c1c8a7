"""Digests of files and of sets of files."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.system.regular_files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, kw_only=True, order=True)
class FileEntry:
    """A file: its path relative to the root (POSIX), its size in bytes and its SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


def set_digest(files: Iterable[FileEntry]) -> str:
    """Return the SHA-256 over the lines `digest  path`, sorted by path: the name of a set of files."""
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a regular file, or of the one that a link names, in hexadecimal."""
    with open_regular(path, follow_links=True) as stream:
        return _hash(stream)


def _hash(stream: Any) -> str:
    if hasattr(hashlib, "file_digest"):  # since Python 3.11
        return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def scan(root: Path, *, below: str = "") -> tuple[FileEntry, ...]:
    """List and hash every regular file below `root / below`, sorted by path.

    Raises:
        IntegrityError: an entry is neither a directory nor a regular file.
    """
    paths = sorted(walk_files(root, root / below if below else root))
    with ThreadPoolExecutor(max_workers=2) as pool:  # hashing releases the interpreter lock
        digests = pool.map(lambda path: hash_file(root / path), paths)
        return tuple(
            FileEntry(path=path, size=(root / path).stat().st_size, sha256=digest)
            for path, digest in zip(paths, digests, strict=True)
        )


def walk_files(root: Path, directory: Path) -> Iterable[str]:
    """List the regular files below `directory`, relative to `root`.

    Raises:
        IntegrityError: a link or a special file.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk_files(root, Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield Path(entry.path).relative_to(root).as_posix()
            else:
                raise IntegrityError(
                    f"{entry.path} is a link or a special file; a warm state holds only regular files",
                    next_step="bake the warm state again with `chatterbox-prewarm bake`",
                )


def verify_files(files: Sequence[FileEntry], root: Path, *, follow_links: bool = False) -> list[str]:
    """Compare size and digest of each file with its entry.

    Args:
        files: the entries.
        root: the folder that the paths of the entries are relative to.
        follow_links: a file may be a link to a regular file.

    Returns:
        a sentence for each file that differs; empty if all match.
    """

    def problem(entry: FileEntry) -> str | None:
        try:
            with open_regular(root / entry.path, follow_links=follow_links) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size != entry.size:
                    return f"{entry.path}: {entry.size} bytes expected, {size} found"
                digest = _hash(stream)
        except OSError as error:
            return f"{entry.path}: {error.strerror}"
        if digest != entry.sha256:
            return f"{entry.path}: sha256 {entry.sha256} expected, {digest} found"
        return None

    with ThreadPoolExecutor(max_workers=2) as pool:
        return [sentence for sentence in pool.map(problem, files) if sentence]
