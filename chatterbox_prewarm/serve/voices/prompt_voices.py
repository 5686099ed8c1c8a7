"""Voices of reference clips that callers of the embedded server give with a text. They end with the server."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.serve.voices.voice_file import SUFFIX, digest_of
from chatterbox_prewarm.system.atomic_files import atomic_file
from chatterbox_prewarm.system.regular_files import read_regular

#: More than the decoder of clips accepts, so that its message names the limit.
_MAX_CLIP_BYTES = 64 << 20
#: Voices that are kept; each file has some hundred kilobytes.
_MAX_VOICES = 256


@dataclass(frozen=True, kw_only=True)
class PromptVoice:
    """The voice of a clip: its name, and the SHA-256 of its file in hexadecimal."""

    name: str
    digest: str


class PromptVoices:
    """The voices in a private temporary folder. The least recently used ones are removed first. Thread-safe.

    Attributes:
        directory: the folder, for `WorkerConfig.voice_directory`.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-voices-", ignore_cleanup_errors=True)
        self.directory = Path(self._folder.name)
        self._voices: OrderedDict[str, PromptVoice] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, clip: bytes) -> PromptVoice | None:
        """Return the voice of a clip if it was added before."""
        with self._lock:
            name = _name(clip)
            if name in self._voices:
                self._voices.move_to_end(name)
            return self._voices.get(name)

    def add(self, clip: bytes, voice_file: bytes) -> PromptVoice:
        """Store the voice of a clip.

        Args:
            clip: the content of the clip's file.
            voice_file: the voice, as a worker computed it from this clip.

        Raises:
            BadInputError: the temporary folder cannot be written.
        """
        voice = PromptVoice(name=_name(clip), digest=digest_of(voice_file))
        with self._lock:
            try:
                with atomic_file(self.directory / f"{voice.name}{SUFFIX}") as temporary:
                    temporary.write_bytes(voice_file)
            except OSError as error:
                raise from_os_error(error, f"writing a voice into {self.directory}") from error
            self._voices[voice.name] = voice
            while len(self._voices) > _MAX_VOICES:
                oldest, _ = self._voices.popitem(last=False)
                (self.directory / f"{oldest}{SUFFIX}").unlink(missing_ok=True)
        return voice

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


def read_prompt(path: str | Path) -> bytes:
    """Read a reference clip.

    Raises:
        BadInputError: the file does not exist or cannot be read.
    """
    try:
        return read_regular(Path(path), follow_links=True, limit=_MAX_CLIP_BYTES)
    except TypeError as error:
        raise BadInputError(f"the path of the clip is {path!r}", next_step="give the path of an audio file") from error
    except OSError as error:
        raise BadInputError(
            f"the clip {path} cannot be read: {error.strerror}", next_step="give the path of an audio file"
        ) from error


def _name(clip: bytes) -> str:
    return f"prompt-{hashlib.sha256(clip).hexdigest()[:32]}"
