"""Encode PCM samples as WAV, FLAC, Opus or MP3, either as a stream or as a complete file.

This module writes WAV and raw PCM itself, and libsndfile writes FLAC, Opus and MP3. libsndfile writes a header first,
and returns to it at the end to add the length. In a stream the header has already been sent. So a streamed FLAC file
declares an unknown length, and a streamed MP3 file lacks the frame with its length. Opus stores the length at the end.
"""

from __future__ import annotations

import os
import struct

from chatterbox_prewarm.errors import BadInputError

SAMPLE_RATE = 24_000
_BYTES_PER_SAMPLE = 2
#: The formats and their media types.
MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
_UNKNOWN_LENGTH = 0xFFFFFFFF
_MP3_KBPS, _OPUS_KBPS = 96, 48
#: libsndfile maps a level from 0 to 1 to a bit rate: from 160 down to 8 kbit/s for MP3 at this sample rate, rounded
#: down to whole kbit/s, and from 256 down to 6 kbit/s per channel for Opus.
_MP3_LEVEL = (160 - _MP3_KBPS - 0.5) / (160 - 8)
_OPUS_LEVEL = (256 - _OPUS_KBPS) / (256 - 6)
_SETTINGS: dict[str, dict[str, str | float]] = {
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "opus": {"format": "OGG", "subtype": "OPUS", "compression_level": _OPUS_LEVEL},
    # A constant bit rate lets a player compute the duration of a stream without a header from its size.
    "mp3": {
        "format": "MP3",
        "subtype": "MPEG_LAYER_III",
        "compression_level": _MP3_LEVEL,
        "bitrate_mode": "CONSTANT",
    },
}
#: Bytes per MP3 frame, which has 576 samples at this sample rate.
_MP3_FRAME = _MP3_KBPS * 1000 // 8 * 576 // SAMPLE_RATE


def encoder(audio_format: str, *, one_shot: bool) -> PcmEncoder | LibsndfileEncoder:
    """Create an encoder for one audio file.

    Args:
        audio_format: a key of `MEDIA_TYPES`.
        one_shot: True to return the complete file, with its length in the header, from `finish`. False to return the
            file in parts, each at most a second later than its samples. PCM has no header and is always streamed.

    Raises:
        BadInputError: the format is unknown.
    """
    if audio_format in {"pcm", "wav"}:
        return PcmEncoder(audio_format, one_shot=one_shot)
    if audio_format in MEDIA_TYPES:
        return LibsndfileEncoder(audio_format, one_shot=one_shot)
    raise BadInputError(f"unknown audio format {audio_format!r}", next_step=f"choose one of: {', '.join(MEDIA_TYPES)}")


class PcmEncoder:
    """Encoder for WAV and raw PCM. Like all encoders, it may be used by one thread at a time.

    A streamed WAV header contains 0xFFFFFFFF for both sizes, as in OpenAI's streamed WAV files. Readers then read until
    the end of the file. Many readers take a size of zero for empty audio.
    """

    def __init__(self, audio_format: str, *, one_shot: bool) -> None:
        self.media_type = MEDIA_TYPES[audio_format]
        self._collected = bytearray() if one_shot and audio_format == "wav" else None
        self._header = _wav_header(None) if audio_format == "wav" else b""

    def encode(self, pcm: bytes) -> bytes:
        """Encode more samples. Returns the part of the file that is ready.

        Args:
            pcm: signed 16-bit little-endian mono samples at 24 kHz. The last sample may be incomplete.
        """
        if self._collected is not None:
            self._collected += pcm
            return b""
        header, self._header = self._header, b""
        return header + pcm

    def finish(self) -> bytes:
        """End the file. Returns the rest of it."""
        if self._collected is None:
            return self.encode(b"")
        return _wav_header(len(self._collected)) + self._collected


def _wav_header(size: int | None) -> bytes:
    """Return the 44 bytes before the samples. `size` is the size of the samples in bytes, if known."""
    riff, data = (_UNKNOWN_LENGTH, _UNKNOWN_LENGTH) if size is None else (36 + size, size)
    rate = SAMPLE_RATE * _BYTES_PER_SAMPLE
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", riff, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, rate, _BYTES_PER_SAMPLE, 8 * _BYTES_PER_SAMPLE),
        *(b"data", data),
    )


class LibsndfileEncoder:
    """Encoder for FLAC, Opus and MP3, with the same methods as `PcmEncoder`."""

    def __init__(self, audio_format: str, *, one_shot: bool) -> None:
        import soundfile

        self.media_type = MEDIA_TYPES[audio_format]
        self._one_shot = one_shot
        self._output = _Output(placeholder=_MP3_FRAME if audio_format == "mp3" and not one_shot else 0)
        self._incomplete_sample = b""
        self._file = soundfile.SoundFile(
            self._output, "w", samplerate=SAMPLE_RATE, channels=1, **_SETTINGS[audio_format]
        )

    def encode(self, pcm: bytes) -> bytes:
        """Encode more samples. Returns the part of the file that is ready."""
        pcm = self._incomplete_sample + pcm
        even = len(pcm) - len(pcm) % _BYTES_PER_SAMPLE
        pcm, self._incomplete_sample = pcm[:even], pcm[even:]
        if pcm:
            self._file.buffer_write(pcm, dtype="int16")
        return b"" if self._one_shot else self._output.take()

    def finish(self) -> bytes:
        """End the file. Returns the rest of it."""
        if not self._file.frames:
            # Without samples, libsndfile writes no file, or a header that it cannot read itself.
            self._file.buffer_write(bytes(_BYTES_PER_SAMPLE), dtype="int16")
        self._file.close()
        return self._output.take()


class _Output:
    """The file object that libsndfile writes to. It ignores changes to bytes that `take` has already returned.

    Args:
        placeholder: the size of the first MP3 frame. libsndfile writes a silent frame there, and replaces it by a
            header at the end. In a stream a player would play the silence, so `take` removes that frame. 0 keeps it.
    """

    def __init__(self, *, placeholder: int = 0) -> None:
        self._buffer = bytearray()
        self._taken = 0
        self._position = 0
        self._placeholder = placeholder

    def take(self) -> bytes:
        """Return the bytes written since the last call."""
        if len(self._buffer) < self._placeholder:
            return b""
        taken = bytes(self._buffer)
        hidden, self._placeholder = self._placeholder, 0
        if any(taken[4:hidden]):  # the four bytes of the frame header are followed by audio
            hidden = 0
        self._taken += len(taken)
        self._buffer.clear()
        return taken[hidden:]

    def write(self, data: bytes) -> int:
        start = self._position - self._taken
        if start >= 0:
            self._buffer[start : start + len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = self._taken + len(self._buffer)
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: end}[whence]
        return self._position

    def tell(self) -> int:
        return self._position
