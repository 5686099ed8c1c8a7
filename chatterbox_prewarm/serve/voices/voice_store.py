"""Added voices: one file each in a directory that outlives the container, and that several replicas may share.

The directory is the only truth. Nothing about it is remembered that a look at it does not confirm, so what another
replica adds or deletes is seen at once. Imports no torch; its calls touch the disk and so belong in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.text import ANY, check_voice_name
from chatterbox_prewarm.serve.voices.durable_files import publish, sync
from chatterbox_prewarm.serve.voices.voice_errors import (
    BakedVoiceError,
    StoreFullError,
    StoreUnavailableError,
    UnknownVoiceError,
    UnusableVoiceError,
    VoiceError,
    VoiceExistsError,
)
from chatterbox_prewarm.serve.voices.voice_file import SUFFIX, check_bytes, digest_of, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

_PART = ".part"
#: What a process that was killed left half written is removed when it is so old that nobody writes it any more.
_STALE_SECONDS = 3600.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NAMES_TOLD = 20


@dataclass(frozen=True, kw_only=True)
class VoiceEntry:
    """A voice.

    Attributes:
        name: what a request calls it.
        baked: whether it came with the server, which holds it in memory for good.
        size: in bytes: of a baked voice's tensors, of an added one's file.
        created: seconds since the epoch; None where that is not known.
        digest: SHA-256 of an added voice's file; another voice under the same name has another.
        problem: why no speech can be made with it; None where it can.
    """

    name: str
    baked: bool
    size: int
    created: int | None = None
    digest: str | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "id": self.name,
            "object": "voice",
            "baked": self.baked,
            "bytes": self.size,
            "created": self.created,
            "digest": self.digest,
            "usable": self.problem is None,
            "reason": self.problem,
        }


class VoiceStore:
    """The voices of a server: those baked into it, and those in its directory.

    Args:
        directory: of the added ones. It need not exist; then none can be added.
        baked: names of the voices that every worker has in memory, and the bytes that each takes there.
        variant: of the model that the server speaks with.
        weights: the set digest of its checkpoint.
        max_voices: how many may be added. Replicas that add at the same time may exceed it by one each.
        aliases: other names of voices, for clients that have names of their own; `text.ANY` is all that no voice has.

    Attributes:
        baked: as above; to be set when the workers have told, since until then nobody knows. `default` always counts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        baked: Mapping[str, int],
        variant: str,
        weights: str,
        max_voices: int = 1000,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.baked = baked
        self._directory = directory
        self._variant, self._weights = variant, weights
        self._max_voices = max_voices
        self._aliases = aliases or {}
        #: By name: what the file looked like when it was read, and what was found. A file is written once.
        self._read: dict[str, tuple[tuple[int, ...], VoiceEntry]] = {}

    def entries(self) -> list[VoiceEntry]:
        """All voices by name, those that cannot be used included; one whose name a baked voice has is left out."""
        found = {name: VoiceEntry(name=name, baked=True, size=size) for name, size in self.baked.items()}
        for name in sorted(self._names())[: self._max_voices]:
            if not self._is_baked(name):
                with contextlib.suppress(UnknownVoiceError):  # deleted meanwhile
                    found[name] = self._look(name)
        for name in set(self._read) - set(found):
            self._read.pop(name, None)
        return sorted(found.values(), key=lambda entry: entry.name)

    def get(self, name: str) -> VoiceEntry:
        """A voice, which may be one that cannot be used.

        Raises:
            UnknownVoiceError: there is none.
            BadInputError: the name cannot name a voice.
        """
        check_voice_name(name)
        if self._is_baked(name):
            return VoiceEntry(name=name, baked=True, size=self.baked.get(name, 0))
        return self._look(name)

    def digest(self, name: str) -> str | None:
        """Which file an added voice is; None for a baked one.

        Raises:
            UnknownVoiceError: there is no such voice.
            UnusableVoiceError: it cannot be used.
            BadInputError: the name cannot name a voice.
        """
        entry = self.get(name)
        if entry.problem:
            raise UnusableVoiceError(
                f"the voice {name!r} cannot be used: {entry.problem}", next_step="delete it and add it again"
            )
        return entry.digest

    def resolve(self, name: str) -> tuple[str, str | None]:
        """The voice that a request means, and its `digest`. A voice goes before an alias of its name.

        Raises:
            UnknownVoiceError, UnusableVoiceError, BadInputError: as `digest`.
        """
        try:
            return name, self.digest(name)
        except UnknownVoiceError:
            meant = self._aliases.get(name, self._aliases.get(ANY))
            if meant is None:
                raise
            return meant, self.digest(meant)

    def check_free(self, name: str) -> None:
        """Refuse a voice that could not be added, before it is made.

        Raises:
            VoiceExistsError, StoreFullError, StoreUnavailableError: see `add`.
            BadInputError: the name cannot name a voice.
        """
        check_voice_name(name)
        if self._is_baked(name):
            raise VoiceExistsError(f"the voice {name!r} is baked into this server", next_step="choose another name")
        if not self._directory.is_dir():
            raise StoreUnavailableError(
                f"voices cannot be added: there is no directory {self._directory}",
                next_step="mount a writable volume there, or name another directory with --voices-dir",
            )
        names = self._names()
        if name in names or os.path.lexists(self._directory / f"{name}{SUFFIX}"):
            raise _exists(name)
        if len(names) >= self._max_voices:
            raise StoreFullError(
                f"there are {len(names)} added voices, and {self._max_voices} is the limit",
                next_step="delete some that nobody uses, or raise --max-voices",
            )

    def add(self, name: str, data: bytes) -> VoiceEntry:
        """Keep a voice for good. Of several calls with one name, in whatever process, one succeeds.

        When this returns, the file is on the disk. A process that is killed meanwhile has added all of it or nothing.

        Args:
            name: see `text.check_voice_name`.
            data: the file, as `worker_voices.voice_bytes` made it.

        Raises:
            VoiceExistsError: there is a voice of that name, added or baked.
            StoreFullError: the disk is full, or as many voices are there as may be.
            StoreUnavailableError: the directory is missing or cannot be written.
            UnusableVoiceError: `data` is no voice for this server's model.
            BadInputError: the name cannot name a voice.
        """
        self.check_free(name)
        check_bytes(data, variant=self._variant, weights=self._weights)
        self._sweep()
        part = self._directory / f".{name}.{os.getpid()}-{secrets.token_hex(8)}{_PART}"
        try:
            publish(data, part, self._directory / f"{name}{SUFFIX}")
        except FileExistsError:
            raise _exists(name) from None
        except OSError as error:
            raise self._refusal(error, f"the voice {name!r} could not be added") from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        logger.info("added the voice %s", name)
        return self._look(name)

    def delete(self, name: str) -> None:
        """Remove an added voice, also one that cannot be used.

        Raises:
            BakedVoiceError: it came with the server.
            UnknownVoiceError: there is none.
            StoreUnavailableError: the directory cannot be written.
            BadInputError: the name cannot name a voice.
        """
        check_voice_name(name)
        if self._is_baked(name):
            raise BakedVoiceError(
                f"the voice {name!r} is baked into this server and cannot be deleted",
                next_step="bake the state without it",
            )
        try:
            (self._directory / f"{name}{SUFFIX}").unlink()
            sync(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown(name) from None
        except OSError as error:
            raise self._refusal(error, f"the voice {name!r} could not be deleted") from error
        self._read.pop(name, None)
        logger.info("deleted the voice %s", name)

    def _is_baked(self, name: str) -> bool:
        return name == DEFAULT_VOICE or name in self.baked

    def _names(self) -> set[str]:
        """Names of the files that may be voices; none where there is no directory."""
        try:
            with os.scandir(self._directory) as found:
                return set(_voices_among(entry.name for entry in found))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            logger.warning("the voices in %s cannot be listed: %s", self._directory, error.strerror)
            return set()

    def _look(self, name: str) -> VoiceEntry:
        """What the directory has under this name.

        Raises:
            UnknownVoiceError: nothing.
        """
        try:
            seen = os.lstat(self._directory / f"{name}{SUFFIX}")
        except OSError:
            raise self._unknown(name) from None
        mark = (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
        known = self._read.get(name)
        if known is not None and known[0] == mark:
            return known[1]
        entry = self._inspect(name, seen)
        if entry.problem:
            logger.warning("the voice %s in %s cannot be used: %s", name, self._directory, entry.problem)
        self._read[name] = (mark, entry)
        return entry

    def _inspect(self, name: str, seen: os.stat_result) -> VoiceEntry:
        try:
            if not stat.S_ISREG(seen.st_mode):
                raise UnusableVoiceError("it is no regular file", next_step="delete it")  # noqa: TRY301 - one way out
            data = read_file(self._directory, name)
            metadata = check_bytes(data, variant=self._variant, weights=self._weights)
        except FileNotFoundError:
            raise self._unknown(name) from None
        except UnusableVoiceError as error:
            return VoiceEntry(name=name, baked=False, size=seen.st_size, problem=error.message)
        except OSError as error:
            problem = f"it cannot be read: {error.strerror}"
            return VoiceEntry(name=name, baked=False, size=seen.st_size, problem=problem)
        return VoiceEntry(name=name, baked=False, size=len(data), created=metadata.created, digest=digest_of(data))

    def _unknown(self, name: str) -> UnknownVoiceError:
        names = sorted({*self.baked, *self._names()})
        told = ", ".join(names[:_NAMES_TOLD]) + (" and others" if len(names) > _NAMES_TOLD else "")
        return UnknownVoiceError(f"there is no voice {name!r}", next_step=f"choose one of: {told}")

    def _refusal(self, error: OSError, what: str) -> VoiceError:
        if error.errno in _FULL:
            return StoreFullError(
                f"{what}: {error.strerror} in {self._directory}", next_step="free some space on that file system"
            )
        return StoreUnavailableError(
            f"{what}: {error.strerror} in {self._directory}",
            next_step="give the server a directory that it may write, on a file system with hard links (--voices-dir)",
        )

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        with contextlib.suppress(OSError), os.scandir(self._directory) as found:
            for entry in found:
                if entry.name.startswith(".") and entry.name.endswith(_PART):
                    with contextlib.suppress(OSError):
                        if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS:
                            os.unlink(entry.path)  # noqa: PTH108 - an entry of scandir


def _voices_among(files: Iterator[str]) -> Iterator[str]:
    """The names of voices among names of files; others are none of ours."""
    for file in files:
        if file.endswith(SUFFIX):
            with contextlib.suppress(BadInputError):
                yield check_voice_name(file.removesuffix(SUFFIX))


def _exists(name: str) -> VoiceExistsError:
    return VoiceExistsError(
        f"there is a voice {name!r} already", next_step="choose another name, or delete that one first"
    )
