"""Reference clips: what a voice may be made of. Imports no torch, so that a bad clip is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

#: The voice that is always there: upstream's own, or one of a generated clip where a checkpoint ships none.
DEFAULT_VOICE = "default"

MIN_SECONDS = 1.0
MAX_SECONDS = 300.0
#: Voice encoder and speech tokenizer hear up to 8 kHz; a clip sampled lower has nothing for them there.
MIN_SAMPLE_RATE = 16_000
#: No recording of a voice is sampled higher; a header that says so does not tell the truth.
MAX_SAMPLE_RATE = 192_000
_SILENCE = 1e-4
_BLOCK = 1 << 16
#: What libsndfile says of a length that the header leaves open; python-soundfile cannot read such a file.
_UNKNOWN = 1 << 62
_CONVERT = "convert it: sox IN -r 24000 -c 1 OUT.wav"
_SPEECH = "give 5 to 10 s of clean speech"


def check_clip(path: Path, *, name: str) -> None:
    """Refuse a reference clip that would give a bad voice.

    Args:
        path: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3).
        name: of the voice, for the message.

    Raises:
        BadInputError: the file is missing, no audio, empty, silent, too short or long, stereo, or of a sampling rate
            too low or too high.
    """
    if name == DEFAULT_VOICE:
        raise BadInputError(f"the voice {name!r} is the built-in one", next_step="give yours another name")
    what = f"the clip {path} for the voice {name!r}"
    if not path.is_file():
        raise BadInputError(f"{what} does not exist", next_step="name an audio file: --voice NAME=PATH")
    read_clip(path, what=what)


def read_clip(
    source: Path | BinaryIO, *, what: str, channels: int = 1, max_samples: int | None = None
) -> tuple[NDArray[np.float32], int]:
    """Decode a reference clip, no further than one may be long, whatever its header says.

    Args:
        source: a file in a format that libsndfile reads.
        what: the clip, as a message names it.
        channels: the most that it may have; several are mixed down to one.
        max_samples: the most samples of a channel that are decoded.

    Returns:
        float32 of shape (n,), all finite, as loud as in the file, and the sampling rate in Hz.

    Raises:
        BadInputError: it would give a bad voice, as for `check_clip`.
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
                    "record it at 24000 Hz or more; raising the rate afterwards brings nothing back",
                )
            if sound.channels > channels:
                raise bad(
                    f"has {sound.channels} channels; at most {channels} can be used",
                    "mix it down to one: sox IN -c 1 OUT.wav",
                )
            if sound.frames >= _UNKNOWN:
                raise bad("does not say how long it is, as FLAC that was written into a pipe", _CONVERT)
            most = int(MAX_SECONDS * rate)
            blocks, total = [], sound.frames if sound.frames > most else 0  # too long by its own account: not decoded
            while total <= min(most, max_samples or most):
                block = sound.read(_BLOCK, dtype="float32", always_2d=True)
                if not len(block):
                    break
                with np.errstate(all="ignore"):  # what is no number is found below
                    blocks.append(block.mean(axis=1, dtype=np.float32))
                total += len(block)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # a file named .raw asks for what it holds
        why = getattr(error, "error_string", str(error))  # without the name of what was opened, which `what` gives
        raise bad(f"is not audio that can be read ({why})", _CONVERT) from error
    # The header may promise more than the file holds.
    if not MIN_SECONDS <= total / rate <= MAX_SECONDS:
        raise bad(f"is {total / rate:.2f} s long; {MIN_SECONDS:.0f} to {MAX_SECONDS:.0f} s are needed", _SPEECH)
    if max_samples is not None and total > max_samples:
        raise bad(f"has more than {max_samples} samples", f"sample it at a lower rate, or {_SPEECH}")
    samples = np.concatenate(blocks)
    check_samples(samples, what=what)
    return samples, rate


def check_samples(samples: NDArray[np.float32], *, what: str) -> None:
    """Refuse samples that are no sound.

    Args:
        samples: of shape (n,), n at least 1.
        what: the clip, as a message names it.

    Raises:
        BadInputError: some are no numbers, or none can be heard.
    """
    import numpy as np

    if not np.isfinite(samples).all():
        raise BadInputError(f"{what} holds samples that are no numbers", next_step=_CONVERT)
    if np.abs(samples).max() < _SILENCE:
        raise BadInputError(f"{what} is silent", next_step=_SPEECH)
