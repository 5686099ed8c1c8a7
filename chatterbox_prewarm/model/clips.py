"""Checks of reference clips. This module does not import torch, so a bad clip is refused immediately."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.mp3_length import with_endless_length
from chatterbox_prewarm.system.limits import MIN_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

#: The built-in voice: upstream's, or a voice of a generated clip if the checkpoint has no voice.
DEFAULT_VOICE = "default"

MAX_SECONDS = 300.0
#: No recording of a voice has a higher sample rate, so a higher value in a header is wrong.
MAX_SAMPLE_RATE = 192_000
_SILENCE = 1e-4
_BLOCK = 1 << 16
#: A header that promises more samples than this (66 days at 192 kHz) does not state the length. libsndfile reports such
#: a number for a FLAC file that was written to a pipe, and `with_endless_length` promises one.
_UNKNOWN_LENGTH = 1 << 40
CONVERT_STEP = (
    "use WAV, FLAC, OGG (Vorbis, Opus), MP3, AIFF or CAF; other formats, such as M4A, MP4, AAC, WebM and WMA, must be "
    "converted: ffmpeg -i IN -ac 1 -ar 24000 OUT.wav"
)
_SPEECH_STEP = "give 5 to 10 s of clean speech"


@dataclass(frozen=True, kw_only=True)
class ClipKind:
    """The requirements for an audio clip that serves one purpose.

    Attributes:
        what: describes the clip in messages.
        min_seconds: the shortest clip. The longest one has `MAX_SECONDS`.
        min_sample_rate: in Hz.
        speech_step, length_step, rate_step: what to do if the clip is silent, if its length cannot be used, and if its
            sample rate cannot.
    """

    what: str
    min_seconds: float
    min_sample_rate: int
    speech_step: str
    length_step: str
    rate_step: str


#: A clip whose voice the model copies. Voice encoder and speech tokenizer use frequencies up to 8 kHz, which a lower
#: sample rate does not contain.
REFERENCE = ClipKind(
    what="the clip",
    min_seconds=1.0,
    min_sample_rate=16_000,
    speech_step=_SPEECH_STEP,
    length_step=_SPEECH_STEP,
    rate_step="record it at 24000 Hz or more; resampling cannot restore missing frequencies",
)
#: Speech to speak with another voice. S3Gen needs three tokens of 40 ms; a telephone has 8 kHz.
SOURCE = ClipKind(
    what="the speech to convert",
    min_seconds=0.04 * MIN_TOKENS,
    min_sample_rate=8_000,
    speech_step="give a recording that contains speech",
    length_step="cut long speech at pauses, and convert the parts separately",
    rate_step="record it at 24000 Hz",
)
#: The kinds by their names in the arguments of a process.
KINDS: Mapping[str, ClipKind] = MappingProxyType({"reference": REFERENCE, "source": SOURCE})


def check_clip(path: Path, *, name: str, longer_than: float = 0.0) -> None:
    """Refuse a reference clip that would give a bad voice.

    Args:
        path: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3).
        name: of the voice, for the message.
        longer_than: seconds that the clip must exceed, see `Variant.clip_seconds`.

    Raises:
        BadInputError: the name belongs to the built-in voice, or the file is missing, not audio, empty, silent, too
            short, too long or stereo, or its sample rate is too low or too high.
    """
    if name == DEFAULT_VOICE:
        raise BadInputError(f"the name {name!r} belongs to the built-in voice", next_step="choose another name")
    what = f"the clip {path} for the voice {name!r}"
    existing_file(path, what=what, next_step="give the path of an audio file")
    read_clip(path, what=what, longer_than=longer_than)


def existing_file(path: object, *, what: str, next_step: str) -> Path:
    """Return a path after a check that there is a file.

    Raises:
        BadInputError: it is not a path, or there is no such file.
    """
    if not isinstance(path, str | os.PathLike) or not Path(path).is_file():
        raise BadInputError(f"{what} does not exist", next_step=next_step)
    return Path(path)


def read_clip(
    source: Path | BinaryIO,
    *,
    what: str,
    channels: int = 1,
    max_samples: int | None = None,
    longer_than: float = 0.0,
    kind: ClipKind = REFERENCE,
) -> tuple[NDArray[np.float32], int]:
    """Decode a clip to its end. Never decodes more than the maximum length, even if the header promises more.

    Args:
        source: a file in a format that libsndfile reads.
        what: describes the clip in messages.
        channels: the maximum number of channels; several are mixed down to one.
        max_samples: the maximum number of samples per channel.
        longer_than: seconds that the clip must exceed.
        kind: what the clip is for.

    Returns:
        float32 of shape (n,), all finite, with the loudness of the file; and the sample rate in Hz.

    Raises:
        BadInputError: the clip cannot be used, as for `check_clip`.
    """
    import numpy as np
    import soundfile

    try:
        with _opened(source) as sound:
            _check_header(sound, what=what, channels=channels, kind=kind)
            rate, promised = sound.samplerate, sound.frames
            limit = int(MAX_SECONDS * rate)
            unknown = promised > _UNKNOWN_LENGTH
            blocks: list[NDArray[np.float32]] = []
            total = promised if promised > limit and not unknown else 0  # do not decode a clip that is too long
            while total <= min(limit, max_samples or limit):
                block = sound.read(min(_BLOCK, promised - total), dtype="float32", always_2d=True)
                if not len(block):
                    break
                with np.errstate(all="ignore"):  # check_samples finds NaN and infinity
                    blocks.append(block.mean(axis=1, dtype=np.float32))
                total += len(block)
    except (
        soundfile.SoundFileError,
        OSError,
        TypeError,
    ) as error:  # TypeError: soundfile asks for the format of a .raw file
        reason = getattr(error, "error_string", str(error))  # without the file name, which `what` contains
        raise BadInputError(f"{what} is not audio that can be read ({reason})", next_step=CONVERT_STEP) from error
    # The header may promise more samples than the file contains.
    if not kind.min_seconds <= total / rate <= MAX_SECONDS:
        seconds = f"more than {MAX_SECONDS:.0f}" if unknown and total > limit else f"{total / rate:.2f}"
        problem = f"is {seconds} s long; {kind.min_seconds:g} to {MAX_SECONDS:.0f} s are needed"
        raise BadInputError(f"{what} {problem}", next_step=kind.length_step)
    if total / rate <= longer_than:
        raise BadInputError(
            f"{what} is {total / rate:.2f} s long; this model needs more than {longer_than:g} s",
            next_step="give 6 to 10 s of clean speech",
        )
    if max_samples is not None and total > max_samples:
        step = f"use a lower sample rate, or {kind.length_step}"
        raise BadInputError(f"{what} has more than {max_samples} samples", next_step=step)
    samples = np.concatenate(blocks)
    check_samples(samples, what=what, speech_step=kind.speech_step)
    return samples, rate


@contextlib.contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[Any]:
    """Open a clip for reading from its beginning to its end. Yields a `soundfile.SoundFile`."""
    import soundfile

    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as stream:
        endless = with_endless_length(stream)
        stream.seek(0)
        with soundfile.SoundFile(endless or source) as sound:
            # Otherwise soundfile seeks after each read, which fails at the end of a FLAC file without a length.
            sound.seekable = lambda: False
            yield sound


def _check_header(sound: Any, *, what: str, channels: int, kind: ClipKind) -> None:
    """Check the sample rate and the number of channels.

    Raises:
        BadInputError: one of them cannot be used.
    """
    rate = sound.samplerate
    if not kind.min_sample_rate <= rate <= MAX_SAMPLE_RATE:
        raise BadInputError(
            f"{what} is sampled at {rate} Hz; {kind.min_sample_rate} to {MAX_SAMPLE_RATE} Hz are needed",
            next_step=kind.rate_step,
        )
    if sound.channels > channels:
        raise BadInputError(
            f"{what} has {sound.channels} channels; at most {channels} can be used",
            next_step="mix it down to one: ffmpeg -i IN -ac 1 OUT.wav",
        )


def has_no_length(path: Path) -> bool:
    """Return whether a clip's header does not state its length. Other readers would stop too early, or not at all."""
    import soundfile

    try:
        with _opened(path) as sound:
            return bool(sound.frames > _UNKNOWN_LENGTH)
    except (soundfile.SoundFileError, OSError, TypeError):  # as in `read_clip`
        return False


@contextlib.contextmanager
def decoded_clip(source: Path | BinaryIO, *, what: str, channels: int = 1, longer_than: float = 0.0) -> Iterator[Path]:
    """Decode a clip into a WAV file of float32, for readers that would trust a wrong length in its header.

    It is a memory file, because the clip contains a person's voice: a killed process must not leave a copy on a disk.

    Args:
        source: a file in a format that libsndfile reads.
        what: describes the clip in messages.
        channels: the maximum number of channels; several are mixed down to one.
        longer_than: seconds that the clip must exceed.

    Raises:
        BadInputError: the clip would give a bad voice, see `check_clip`.
    """
    import soundfile

    samples, rate = read_clip(source, what=what, channels=channels, longer_than=longer_than)
    with os.fdopen(os.memfd_create("clip", os.MFD_CLOEXEC), "wb") as file:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        soundfile.write(path, samples, rate, format="WAV", subtype="FLOAT")
        yield path


def check_samples(samples: NDArray[np.float32], *, what: str, speech_step: str = _SPEECH_STEP) -> None:
    """Refuse samples that are silent or not finite.

    Args:
        samples: float32 of shape (n,), n at least 1.
        what: describes the clip in messages.
        speech_step: what to do if the samples are silent.

    Raises:
        BadInputError: a sample is NaN or infinite, or all samples are silent.
    """
    import numpy as np

    if not np.isfinite(samples).all():
        raise BadInputError(f"{what} contains NaN or infinity", next_step=CONVERT_STEP)
    if np.abs(samples).max() < _SILENCE:
        raise BadInputError(f"{what} is silent", next_step=speech_step)
