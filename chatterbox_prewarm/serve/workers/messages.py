"""What front and worker say to each other, besides the phases of a start.

The front sends `speak`, `voice`, `cancel` and `stop`. A worker answers `speak` with `audio` for each chunk, `voice`
with `voice`, and either with `error` or, after a `cancel`, with `cancelled`. Meanwhile it sends `progress`, by which a
busy worker differs from one that hangs.

From its first moment on a worker sends `alive` every second, by which one that starts or has nothing to do differs from
one that was stopped. It sends `warming` with the step of the idle warm-up that it begins, and without when it left it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

#: Seconds between two reports of a worker that is at work.
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class PartOrder:
    """A text to speak in one go, and how.

    Attributes:
        text: at most what T3 takes at once.
        voice: a baked voice, or with `voice_digest` an added one.
        voice_digest: of the added voice's file, in hexadecimal.
        seed: of all that is drawn.
        max_new_tokens: bound on the speech tokens, 25 a second of audio.
        temperature, cfg_weight, exaggeration: as in `Sampling`; None is the default.
        look_ahead: as in `generate_stream`.
        chunk_tokens: speech tokens to a chunk; None makes one of all.
    """

    text: str
    voice: str
    voice_digest: str | None = None
    seed: int
    max_new_tokens: int
    temperature: float | None = None
    cfg_weight: float | None = None
    exaggeration: float | None = None
    look_ahead: int | None = None
    chunk_tokens: int | None = None

    def to_message(self) -> dict[str, Any]:
        """As it travels in the header of a frame."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of the sound of a text.

    Attributes:
        pcm: mono audio at 24 kHz, 16-bit little-endian samples.
        tokens: how many speech tokens it is the sound of.
        seconds: how long the worker was at work on that text; with its last chunk only.
    """

    pcm: bytes
    tokens: int
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a worker's process holds.

    Attributes:
        rss_bytes: memory of the process.
        vram_bytes: of its device, as PyTorch's allocator has reserved it.
        vram_peak_bytes: the most of that which was in use at once.
        hooks: hooks registered on modules of the model; constant unless something leaks.
        voices, voice_bytes: added voices in memory.
    """

    rss_bytes: int = 0
    vram_bytes: int = 0
    vram_peak_bytes: int = 0
    hooks: int = 0
    voices: int = 0
    voice_bytes: int = 0
