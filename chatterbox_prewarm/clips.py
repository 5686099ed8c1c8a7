"""Reference clips: what a voice may be made of. Imports no torch, so that a bad clip is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError

if TYPE_CHECKING:
    from pathlib import Path

#: The voice that is always there: upstream's own, or one of a generated clip where a checkpoint ships none.
DEFAULT_VOICE = "default"

MIN_SECONDS = 1.0
MAX_SECONDS = 300.0
#: Voice encoder and speech tokenizer hear up to 8 kHz; a clip sampled lower has nothing for them there.
MIN_SAMPLE_RATE = 16_000
_SILENCE = 1e-4


def check_clip(path: Path, *, name: str) -> None:
    """Refuse a reference clip that would give a bad voice.

    Args:
        path: a file in a format that libsndfile reads (WAV, FLAC, OGG, MP3).
        name: of the voice, for the message.

    Raises:
        BadInputError: the file is missing, no audio, empty, silent, too short or long, stereo, or sampled too low.
    """
    import numpy as np
    import soundfile

    def bad(problem: str, step: str) -> BadInputError:
        return BadInputError(f"the clip {path} for the voice {name!r} {problem}", next_step=step)

    if name == DEFAULT_VOICE:
        raise BadInputError(f"the voice {name!r} is the built-in one", next_step="give yours another name")
    if not path.is_file():
        raise bad("does not exist", "name an audio file: --voice NAME=PATH")
    try:
        info = soundfile.info(path)
        too_long = info.duration > MAX_SECONDS
        samples, _ = soundfile.read(path, dtype="float32", frames=1 if too_long else -1)
    except (soundfile.LibsndfileError, OSError) as error:
        raise bad(f"is not audio that can be read ({error})", "convert it: sox IN -r 24000 -c 1 OUT.wav") from error
    # The header may promise more than the file holds.
    seconds = info.duration if too_long else len(samples) / info.samplerate
    if info.samplerate < MIN_SAMPLE_RATE:
        raise bad(
            f"is sampled at {info.samplerate} Hz; at least {MIN_SAMPLE_RATE} Hz are needed",
            "record it at 24000 Hz or more; raising the rate afterwards brings nothing back",
        )
    if info.channels != 1:
        raise bad(f"has {info.channels} channels", "mix it down to one: sox IN -c 1 OUT.wav")
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise bad(
            f"is {seconds:.2f} s long; {MIN_SECONDS:.0f} to {MAX_SECONDS:.0f} s are needed",
            "give 5 to 10 s of clean speech",
        )
    if not np.isfinite(samples).all():
        raise bad("holds samples that are no numbers", "convert it: sox IN -r 24000 -c 1 OUT.wav")
    if np.abs(samples).max() < _SILENCE:
        raise bad("is silent", "give 5 to 10 s of clean speech")
