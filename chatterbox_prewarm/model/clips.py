"""Checks of reference clips. This module does not import torch, so a bad clip is refused immediately."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

#: The built-in voice: upstream's, or a voice of a generated clip if the checkpoint has no voice.
DEFAULT_VOICE = "default"

MIN_SECONDS = 1.0
MAX_SECONDS = 300.0
#: Voice encoder and speech tokenizer use frequencies up to 8 kHz, which a lower sample rate does not contain.
MIN_SAMPLE_RATE = 16_000
#: No recording of a voice has a higher sample rate, so a higher value in a header is wrong.
MAX_SAMPLE_RATE = 192_000
_SILENCE = 1e-4
_BLOCK = 1 << 16
#: libsndfile reports at least this length if the header has no length. python-soundfile cannot read such a file.
_UNKNOWN_LENGTH = 1 << 62
_CONVERT_STEP = "convert it: sox IN -r 24000 -c 1 OUT.wav"
_SPEECH_STEP = "give 5 to 10 s of clean speech"


def check_clip(path: Path, *, name: str) -> None:
    """Refuse a reference clip that would give a bad voice.

    Args:
        path: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3).
        name: of the voice, for the message.

    Raises:
        BadInputError: the name belongs to the built-in voice, or the file is missing, not audio, empty, silent, too
            short, too long or stereo, or its sample rate is too low or too high.
    """
    if name == DEFAULT_VOICE:
        raise BadInputError(f"the name {name!r} belongs to the built-in voice", next_step="choose another name")
    what = f"the clip {path} for the voice {name!r}"
    if not path.is_file():
        raise BadInputError(f"{what} does not exist", next_step="give an audio file: --voice NAME=PATH")
    read_clip(path, what=what)


def read_clip(
    source: Path | BinaryIO, *, what: str, channels: int = 1, max_samples: int | None = None
) -> tuple[NDArray[np.float32], int]:
    """Decode a reference clip. Never decodes more than the maximum length, even if the header promises more.

    Args:
        source: a file in a format that libsndfile reads.
        what: describes the clip in messages.
        channels: the maximum number of channels; several are mixed down to one.
        max_samples: the maximum number of samples per channel.

    Returns:
        float32 of shape (n,), all finite, with the loudness of the file; and the sample rate in Hz.

    Raises:
        BadInputError: the clip would give a bad voice, see `check_clip`.
    """
    import numpy as np
    import soundfile

    def bad(problem: str, step: str) -> BadInputError:
        return BadInputError(f"{what} {problem}", next_step=step)

    try:
        with soundfile.SoundFile(source) as sound:
            rate = sound.samplerate
            if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
                raise bad(
                    f"is sampled at {rate} Hz; {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz are needed",
                    "record it at 24000 Hz or more; resampling cannot restore missing frequencies",
                )
            if sound.channels > channels:
                raise bad(
                    f"has {sound.channels} channels; at most {channels} can be used",
                    "mix it down to one: sox IN -c 1 OUT.wav",
                )
            if sound.frames >= _UNKNOWN_LENGTH:
                raise bad("does not say how long it is, like a FLAC file written to a pipe", _CONVERT_STEP)
            limit = int(MAX_SECONDS * rate)
            blocks, total = [], sound.frames if sound.frames > limit else 0  # do not decode a clip that is too long
            while total <= min(limit, max_samples or limit):
                block = sound.read(_BLOCK, dtype="float32", always_2d=True)
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
        raise bad(f"is not audio that can be read ({reason})", _CONVERT_STEP) from error
    # The header may promise more samples than the file contains.
    if not MIN_SECONDS <= total / rate <= MAX_SECONDS:
        raise bad(f"is {total / rate:.2f} s long; {MIN_SECONDS:.0f} to {MAX_SECONDS:.0f} s are needed", _SPEECH_STEP)
    if max_samples is not None and total > max_samples:
        raise bad(f"has more than {max_samples} samples", f"use a lower sample rate, or {_SPEECH_STEP}")
    samples = np.concatenate(blocks)
    check_samples(samples, what=what)
    return samples, rate


def check_samples(samples: NDArray[np.float32], *, what: str) -> None:
    """Refuse samples that are silent or not finite.

    Args:
        samples: float32 of shape (n,), n at least 1.
        what: describes the clip in messages.

    Raises:
        BadInputError: a sample is NaN or infinite, or all samples are silent.
    """
    import numpy as np

    if not np.isfinite(samples).all():
        raise BadInputError(f"{what} contains NaN or infinity", next_step=_CONVERT_STEP)
    if np.abs(samples).max() < _SILENCE:
        raise BadInputError(f"{what} is silent", next_step=_SPEECH_STEP)
