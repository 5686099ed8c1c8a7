"""A part of a streamed synthesis. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a streamed synthesis.

    Attributes:
        samples: float32 (m,) within [-1, 1], watermarked mono audio at 24 kHz.
        tokens: int64 (n,), the speech tokens of these samples, 25 per second.
        index: of the chunk, from 0.
        seconds: from the call to this chunk.
        is_last: whether this is the last chunk.
        is_truncated: whether the speech ended at the token limit instead of the stop token, so that its end may be
            missing. With `look_ahead`, this is known only in the last chunk.
    """

    samples: NDArray[np.float32]
    tokens: NDArray[np.int64]
    index: int
    seconds: float
    is_last: bool
    is_truncated: bool = False

    @property
    def pcm(self) -> NDArray[np.int16]:
        """The audio as 16-bit samples."""
        from chatterbox_prewarm.model.synthesis import as_pcm

        return as_pcm(self.samples)
