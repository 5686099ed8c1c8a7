"""Speech as the embedded server returns it."""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Watermarked mono speech: all of a text, or a chunk of it.

    Attributes:
        data: 16-bit little-endian samples.
        sample_rate: in Hz.
        is_truncated: whether the speech of a part reached the token limit, so that its end may be missing.
        skipped_parts: number of parts of the text that could not be spoken; in a chunk: only those directly before it.
            If the last part was left out, the last chunk has no samples.
    """

    data: bytes
    sample_rate: int = 24_000
    is_truncated: bool = False
    skipped_parts: int = 0

    @property
    def pcm(self) -> NDArray[np.int16]:
        """The samples, int16 of shape (n,)."""
        import numpy as np

        return np.frombuffer(self.data, dtype="<i2")

    @property
    def wav(self) -> bytes:
        """The audio as a WAV file."""
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.sample_rate)
            file.writeframes(self.data)
        return buffer.getvalue()

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return len(self.data) / 2 / self.sample_rate
