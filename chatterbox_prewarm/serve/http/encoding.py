"""From the model's samples to the format that was asked for, in pieces as they come or as a whole file.

WAV and raw samples are written here; FLAC, Opus and MP3 by libsndfile. It writes a header first and, when the sound is
complete, goes back to it with the length. A header that has been sent stays as it was: a streamed FLAC file says that
its length is unknown, and a streamed MP3 file lacks the frame that would tell it. Opus has its length at the end.
"""

from __future__ import annotations

import os
import struct
from typing import Protocol

from chatterbox_prewarm.errors import BadInputError

SAMPLE_RATE = 24_000
_BYTES_PER_SAMPLE = 2
#: Each format that can be asked for, and what its sound is called over HTTP.
MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
_UNKNOWN_LENGTH = 0xFFFFFFFF
_MP3_KBPS, _OPUS_KBPS = 96, 48
#: libsndfile takes bit rates as a level from 0 to 1: from 160 down to 8 kbit/s for MP3 at this sample rate, to whole
#: kbit/s rounded down, and from 256 down to 6 for a channel of Opus.
_MP3_LEVEL = (160 - _MP3_KBPS - 0.5) / (160 - 8)
_OPUS_LEVEL = (256 - _OPUS_KBPS) / (256 - 6)
_SETTINGS: dict[str, dict[str, str | float]] = {
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "opus": {"format": "OGG", "subtype": "OPUS", "compression_level": _OPUS_LEVEL},
    # At a constant rate a player tells the length of a file without a header from its bytes.
    "mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "compression_level": _MP3_LEVEL,
        "bitrate_mode": "CONSTANT",
    },
}
#: Bytes; a frame is 576 samples at this sample rate.
_MP3_FRAME = _MP3_KBPS * 1000 // 8 * 576 // SAMPLE_RATE


class Encoder(Protocol):
    """A sound on its way into a format; used by one thread at a time. One that is dropped leaves nothing behind."""

    media_type: str

    def encode(self, pcm: bytes) -> bytes:
        """Take more of the sound; returns what of the file is ready.

        Args:
            pcm: signed 16-bit little-endian mono samples at 24 kHz; any number of bytes, a sample may be cut in two.
        """

    def finish(self) -> bytes:
        """The sound is complete; returns the rest of the file."""


def encoder(audio_format: str, *, whole: bool) -> Encoder:
    """An encoder for one sound.

    Args:
        audio_format: one of `MEDIA_TYPES`.
        whole: all of the file comes from `finish` (of raw samples, which have no header, it comes at once). Its header
            then holds its length. Otherwise it comes piece by piece, each within a second of its sound.

    Raises:
        BadInputError: there is no such format.
    """
    if audio_format == "pcm":
        return _Pcm()
    if audio_format == "wav":
        return _WholeWav() if whole else _StreamedWav()
    if audio_format in MEDIA_TYPES:
        return _Encoded(audio_format, whole=whole)
    raise BadInputError(f"there is no format {audio_format!r}", next_step=f"choose one of: {', '.join(MEDIA_TYPES)}")


class _Pcm:
    """The samples as they are."""

    media_type = MEDIA_TYPES["pcm"]

    def encode(self, pcm: bytes) -> bytes:
        return pcm

    def finish(self) -> bytes:
        return b""


class _StreamedWav:
    """A WAV file whose length is not known when its header is sent.

    Both sizes in the header are 0xFFFFFFFF, the largest there is, as in OpenAI's streamed WAV files: a reader goes on
    until the file ends. Zero would be an empty sound to many.
    """

    media_type = MEDIA_TYPES["wav"]

    def __init__(self) -> None:
        self._header = _wav_header(None)

    def encode(self, pcm: bytes) -> bytes:
        header, self._header = self._header, b""
        return header + pcm

    def finish(self) -> bytes:
        return self.encode(b"")


class _WholeWav:
    """A WAV file with its length in its header."""

    media_type = MEDIA_TYPES["wav"]

    def __init__(self) -> None:
        self._pcm = bytearray()

    def encode(self, pcm: bytes) -> bytes:
        self._pcm += pcm
        return b""

    def finish(self) -> bytes:
        return _wav_header(len(self._pcm)) + self._pcm


def _wav_header(size: int | None) -> bytes:
    """The 44 bytes before the samples; `size` is how many bytes of those there are."""
    riff, data = (_UNKNOWN_LENGTH, _UNKNOWN_LENGTH) if size is None else (36 + size, size)
    rate = SAMPLE_RATE * _BYTES_PER_SAMPLE
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", riff, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, rate, _BYTES_PER_SAMPLE, 8 * _BYTES_PER_SAMPLE),
        *(b"data", data),
    )


class _Encoded:
    """A format that libsndfile writes."""

    def __init__(self, audio_format: str, *, whole: bool) -> None:
        import soundfile

        self.media_type = MEDIA_TYPES[audio_format]
        self._whole = whole
        self._outlet = _Outlet(placeholder=_MP3_FRAME if audio_format == "mp3" and not whole else 0)
        self._cut = b""
        self._file = soundfile.SoundFile(
            self._outlet, "w", samplerate=SAMPLE_RATE, channels=1, **_SETTINGS[audio_format]
        )

    def encode(self, pcm: bytes) -> bytes:
        pcm = self._cut + pcm
        even = len(pcm) - len(pcm) % _BYTES_PER_SAMPLE
        pcm, self._cut = pcm[:even], pcm[even:]
        if pcm:
            self._file.buffer_write(pcm, dtype="int16")
        return b"" if self._whole else self._outlet.take()

    def finish(self) -> bytes:
        if not self._file.frames:
            # Without any samples libsndfile writes no file, or a header that it does not read itself.
            self._file.buffer_write(bytes(_BYTES_PER_SAMPLE), dtype="int16")
        self._file.close()
        return self._outlet.take()


class _Outlet:
    """The file that libsndfile writes to: keeps what has not been taken, and ignores corrections of what has.

    Args:
        placeholder: the length of the frame that an MP3 file begins with. It is silent, and would be played as such: it
            becomes the header only when the sound is complete. With this it is left out; 0 leaves it in.
    """

    def __init__(self, *, placeholder: int = 0) -> None:
        self._kept = bytearray()
        self._taken = 0
        self._position = 0
        self._placeholder = placeholder

    def take(self) -> bytes:
        """What was written since the last time."""
        if len(self._kept) < self._placeholder:
            return b""
        taken = bytes(self._kept)
        hidden, self._placeholder = self._placeholder, 0
        if any(taken[4:hidden]):  # after four bytes of every frame's header: sound
            hidden = 0
        self._taken += len(taken)
        self._kept.clear()
        return taken[hidden:]

    def write(self, data: bytes) -> int:
        start = self._position - self._taken
        if start >= 0:
            self._kept[start : start + len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = self._taken + len(self._kept)
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        return self._position

    def tell(self) -> int:
        return self._position
