"""Added voices: one file each, in a directory that outlives the container and that several replicas may share.

The store caches nothing that it does not check against the directory on each call, so it notices at once what another
replica adds or deletes. It imports no torch. Its methods use the disk, so call them in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import reprlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.text import ANY, check_voice_name, is_voice_name
from chatterbox_prewarm.serve.voices.voice_errors import UnknownVoiceError, UnusableVoiceError, VoiceError
from chatterbox_prewarm.serve.voices.voice_file import SUFFIX, check_bytes, digest_of, read_file
from chatterbox_prewarm.system.atomic_files import atomic_file, flush
from chatterbox_prewarm.system.fingerprint import upstream_installed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

#: Names that `atomic_file` gives to temporary files.
_TEMPORARY = re.compile(rf"\..+{re.escape(SUFFIX)}\.[0-9a-f]+")
#: A temporary file is removed when it is so old that no process can still be writing it.
_STALE_SECONDS = 3600.0
_MAX_NAMES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class VoiceEntry:
    """A voice of the server.

    Attributes:
        name: its name in requests.
        baked: whether it is part of the server and always in memory.
        size: in bytes: of a baked voice's tensors, of an added voice's file.
        created: seconds since the epoch; None if unknown.
        digest: SHA-256 of an added voice's file, in hexadecimal.
        models: the models that can speak with it.
        problem: why a model, or the server, cannot use it; None if all models can.
    """

    name: str
    baked: bool
    size: int
    created: int | None = None
    digest: str | None = None
    models: tuple[str, ...] = ()
    problem: str | None = None


class VoiceStore:
    """The voices of a server: baked voices, and added voices in a directory.

    Args:
        directory: the directory of the added voices. If it does not exist, no voice can be added.
        models: set digest of the checkpoint by the variant of each model; the first one is the server's default.
        max_voices: maximum number of added voices. Replicas that add at the same time may exceed it by one each.
        aliases: alternative names of voices; the alias `text.ANY` matches every name without a voice.

    Attributes:
        baked: for each model the names of its baked voices, and the bytes that each takes in a worker's memory. Set
            them when a worker has reported its voices; "default" always counts as baked.
    """

    def __init__(
        self,
        directory: Path,
        models: Mapping[str, str],
        *,
        max_voices: int = 1000,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.baked: dict[str, Mapping[str, int]] = {name: {} for name in models}
        self._directory = directory
        self._models = dict(models)
        self._max_voices = max_voices
        self._aliases = aliases or {}
        #: For each name the identity of the file that was read last, and the result. A file is never modified.
        self._cache: dict[str, tuple[tuple[int, ...], VoiceEntry]] = {}

    def entries(self) -> list[VoiceEntry]:
        """Return all voices by name, including unusable ones. A baked voice hides a file of the same name."""
        entries = {name: self._baked_entry(name) for voices in self.baked.values() for name in voices}
        for name in sorted(self._names())[: self._max_voices]:
            if not self._is_baked(name):
                with contextlib.suppress(UnknownVoiceError):  # another process has just deleted it
                    entries[name] = self._added(name)
        for name in set(self._cache) - set(entries):
            self._cache.pop(name, None)  # another thread may have removed it
        return sorted(entries.values(), key=lambda entry: entry.name)

    def get(self, name: str) -> VoiceEntry:
        """Return a voice, even if it is unusable.

        Raises:
            UnknownVoiceError: no voice has this name.
            BadInputError: the name is not a valid voice name.
        """
        check_voice_name(name)
        return self._baked_entry(name) if self._is_baked(name) else self._added(name)

    def digest(self, name: str, model: str = "") -> str | None:
        """Return the digest of an added voice's file; None for a baked voice.

        Args:
            name: of the voice.
            model: the model that will speak with it; "" for the first one.

        Raises:
            UnusableVoiceError: the model cannot use the voice.
            UnknownVoiceError, BadInputError: as for `get`.
        """
        entry, model = self.get(name), model or next(iter(self._models))
        if model in entry.models:
            return entry.digest
        if entry.baked:
            # A model without such a baked voice uses an added voice of this name.
            with contextlib.suppress(UnknownVoiceError):
                added = self._added(name)
                if model in added.models:
                    return added.digest
            raise UnusableVoiceError(
                f"the voice {name!r} is baked for the model {', '.join(entry.models)}, and not for {model!r}",
                next_step="choose another voice or model, or bake the voice into the state of this model, too",
            )
        raise UnusableVoiceError(
            f"the voice {name!r} cannot be used: {entry.problem}", next_step="delete it and add it again"
        )

    def resolve(self, name: str, model: str = "") -> tuple[str, str | None]:
        """Return the voice that a request means, and its `digest`. A voice takes precedence over an alias.

        Args:
            name: any string. Clients of other servers send names that no voice can have here, such as `Emily.wav`.
            model: as for `digest`.

        Raises:
            UnknownVoiceError: neither a voice nor an alias has this name.
            UnusableVoiceError: as for `digest`.
        """
        if is_voice_name(name):
            with contextlib.suppress(UnknownVoiceError):
                return name, self.digest(name, model)
        target = self._aliases.get(name, self._aliases.get(ANY))
        if target is None:
            raise self._unknown(name, "start the server with --voice-alias NAME=VOICE")
        return target, self.digest(target, model)

    def check_free(self, name: str) -> None:
        """Check that a voice can be added, before it is computed. The errors are those of `add`."""
        check_voice_name(name)
        if self._is_baked(name):
            raise _exists(f"the voice {name!r} is baked into this server", "choose another name")
        if not self._directory.is_dir():
            raise VoiceError(
                f"voices cannot be added: there is no directory {self._directory}",
                next_step="mount a writable volume there, or name another directory with --voices-dir",
                code="voices_unavailable",
            )
        names = self._names()
        if name in names or os.path.lexists(self._path(name)):
            raise _exists(f"there is already a voice {name!r}")
        if len(names) >= self._max_voices:
            raise VoiceError(
                f"there are {len(names)} added voices, and {self._max_voices} is the limit",
                next_step="delete voices that are not used, or raise --max-voices",
                code="voices_full",
            )

    def add(self, name: str, data: bytes) -> VoiceEntry:
        """Add a voice permanently. If several processes add the same name, one of them succeeds.

        The file is on the disk when this returns. A process that is killed adds all of the file or nothing.

        Args:
            name: see `text.check_voice_name`.
            data: the file, as `voice_process.make_voice` returned it.

        Raises:
            VoiceError: the name is taken ("voice_exists"), the disk or the limit is full ("voices_full"), or the
                directory is missing or not writable ("voices_unavailable").
            UnusableVoiceError: `data` is not a voice for this server's model.
            BadInputError: the name is not a valid voice name.
        """
        self.check_free(name)
        for model, problem in check_bytes(data, self._models).problems.items():
            raise UnusableVoiceError(f"the model {model} cannot use the voice: {problem}", next_step="add it again")
        self._remove_stale_files()
        try:
            with atomic_file(self._path(name), mode=0o644, durable=True, exclusive=True) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            raise _exists(f"there is already a voice {name!r}") from None
        except OSError as error:
            raise self._write_error(error, f"the voice {name!r} could not be added") from error
        logger.info("added the voice %s", name)
        return self._added(name)

    def delete(self, name: str) -> None:
        """Delete an added voice, even if it is unusable.

        Raises:
            VoiceError: the voice is baked ("voice_is_baked"), or the directory is not writable ("voices_unavailable").
            UnknownVoiceError, BadInputError: as for `get`.
        """
        check_voice_name(name)
        if self._is_baked(name) and not (self._is_partly_baked(name) and os.path.lexists(self._path(name))):
            raise VoiceError(
                f"the voice {name!r} is baked into this server and cannot be deleted",
                next_step="bake the state without it",
                code="voice_is_baked",
            )
        try:
            self._path(name).unlink()
            flush(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            raise self._unknown(name) from None
        except OSError as error:
            raise self._write_error(error, f"the voice {name!r} could not be deleted") from error
        self._cache.pop(name, None)
        logger.info("deleted the voice %s", name)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{SUFFIX}"

    def _is_baked(self, name: str) -> bool:
        return name == DEFAULT_VOICE or any(name in voices for voices in self.baked.values())

    def _is_partly_baked(self, name: str) -> bool:
        """Return whether a model has no baked voice of this name, so that it uses an added one."""
        return name != DEFAULT_VOICE and not all(name in voices for voices in self.baked.values())

    def _baked_entry(self, name: str) -> VoiceEntry:
        sizes = {model: voices.get(name, 0) for model, voices in self.baked.items()}
        models = [model for model, voices in self.baked.items() if name in voices or name == DEFAULT_VOICE]
        return VoiceEntry(name=name, baked=True, size=sum(sizes.values()), models=tuple(models))

    def _names(self) -> set[str]:
        """Return the names of all files that may be voices."""
        names = set()
        try:
            for file in os.listdir(self._directory):  # noqa: PTH208 - names are enough
                if file.endswith(SUFFIX):
                    with contextlib.suppress(BadInputError):
                        names.add(check_voice_name(file.removesuffix(SUFFIX)))
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                logger.warning("the voices in %s cannot be listed: %s", self._directory, error.strerror)
        return names

    def _added(self, name: str) -> VoiceEntry:
        """Return an added voice, from the cache if its file is still the same.

        Raises:
            UnknownVoiceError: there is no such file.
        """
        try:
            status = os.lstat(self._path(name))
        except OSError:
            raise self._unknown(name) from None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        cached = self._cache.get(name)
        if cached is not None and cached[0] == identity:
            return cached[1]
        entry = self._inspect(name, status.st_size)
        if entry.problem:
            logger.warning("the voice %s in %s cannot be used: %s", name, self._directory, entry.problem)
        self._cache[name] = (identity, entry)
        return entry

    def _inspect(self, name: str, size: int) -> VoiceEntry:
        """Read and check the file of a voice."""
        try:
            data = read_file(self._directory, name)
            checked = check_bytes(data, self._models)
        except FileNotFoundError:
            raise self._unknown(name) from None
        except (UnusableVoiceError, OSError) as error:
            problem = f"it cannot be read: {error.strerror}" if isinstance(error, OSError) else error.message
            return VoiceEntry(name=name, baked=False, size=size, problem=problem)
        return VoiceEntry(
            name=name,
            baked=False,
            size=len(data),
            created=checked.created,
            digest=digest_of(data),
            models=tuple(model for model in self._models if model not in checked.problems),
            problem=next(iter(checked.problems.values()), None),
        )

    def _unknown(self, name: str, *other_steps: str) -> UnknownVoiceError:
        names = sorted({*self._names(), *(name for voices in self.baked.values() for name in voices)})
        shown = ", ".join(names[:_MAX_NAMES_SHOWN]) + (" and others" if len(names) > _MAX_NAMES_SHOWN else "")
        add = "add it with POST /v1/audio/voices" if upstream_installed() else "bake it into the image"
        next_step = ", or ".join((f"choose one of: {shown}", add, *other_steps))
        return UnknownVoiceError(f"there is no voice {reprlib.repr(name)}", next_step=next_step)

    def _write_error(self, error: OSError, message: str) -> VoiceError:
        next_step = "give the server a writable directory on a file system with hard links (--voices-dir)"
        code = "voices_unavailable"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            next_step, code = "free some space on that file system", "voices_full"
        return VoiceError(f"{message}: {error.strerror} in {self._directory}", next_step=next_step, code=code)

    def _remove_stale_files(self) -> None:
        """Remove temporary files of processes that were killed while they added a voice."""
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if _TEMPORARY.fullmatch(path.name) and time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def _exists(message: str, next_step: str = "choose another name, or delete that voice first") -> VoiceError:
    return VoiceError(message, next_step=next_step, code="voice_exists")
