"""The work of a stream: draw tokens, render their spectrogram, vocoder and watermark, chunk by chunk.

`model.streaming` describes the two modes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.model.chunk import Chunk
from chatterbox_prewarm.model.regions.overlap import OverlappingWindows
from chatterbox_prewarm.model.regions.region import MAX_FRAMES
from chatterbox_prewarm.model.regions.vocoder import HELD_FRAMES, SAMPLES_PER_FRAME
from chatterbox_prewarm.model.synthesis import preserved_generators, seed_everything
from chatterbox_prewarm.system.limits import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import NDArray

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.synthesis import Synthesizer

    Piece = tuple[torch.Tensor, torch.Tensor, bool]  # tokens, their mel spectrogram, whether the piece is the last

logger = logging.getLogger(__name__)

_FRAMES_PER_TOKEN = 2
#: The number of mel frames in which the flow's output for one chunk is blended into that for the next chunk.
_BLENDED_FRAMES = 6
#: The watermark works on steps of 10 ms. On each side, Perth's encoder sees 15 steps, its two Fourier transforms 3.2
#: steps each, and its resamplers about a hundred samples.
_STEP = 240
_WATERMARK_CONTEXT = 24
#: The number of mel frames that the vocoder and the watermark hold back together.
_HELD_FRAMES = HELD_FRAMES + _WATERMARK_CONTEXT * _STEP // SAMPLES_PER_FRAME
#: Added to the seed for the noise of a stream that looks ahead.
_NOISE_SEED = 0x9E3779B9


class _StoppedError(Exception):
    """The caller has stopped the stream."""


class Stream:
    """One streamed synthesis. `generate_stream` documents the arguments."""

    def __init__(
        self,
        synthesizer: Synthesizer,
        voice: Conditionals,
        chunk_tokens: int,
        look_ahead: int | None,
        stopped: Callable[[], bool],
    ) -> None:
        self._synthesizer = synthesizer
        self._model = synthesizer.model
        self._voice = voice.gen
        self._chunk_tokens = chunk_tokens
        self._look_ahead = look_ahead
        self._stopped = stopped
        self._is_truncated = False

    def chunks(self, blocks: Generator[torch.Tensor], seed: int, called: float) -> Generator[Chunk]:
        """Yield the chunks; `blocks` draws the tokens."""
        with contextlib.suppress(_StoppedError):
            yield from self._chunks(blocks, seed, called)

    # The decorator switches inference mode off at each yield, so that it does not affect the caller's code.
    @torch.inference_mode()
    def _chunks(self, blocks: Generator[torch.Tensor], seed: int, called: float) -> Generator[Chunk]:
        seed_everything(seed)
        size = _FRAMES_PER_TOKEN * SAMPLES_PER_FRAME * self._chunk_tokens
        tokens, ready, index = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), 0
        with contextlib.closing(blocks), contextlib.closing(self._sound(blocks, seed)) as sound:
            for new_tokens, samples, last in sound:
                tokens, ready = np.concatenate([tokens, new_tokens]), np.concatenate([ready, samples])
                while ready.size >= size or (last and ready.size):
                    is_last = last and ready.size <= size
                    chunk = Chunk(
                        samples=ready[:size],
                        tokens=tokens if is_last else tokens[: self._chunk_tokens],  # the last token may have no audio
                        index=index,
                        seconds=time.perf_counter() - called,
                        is_last=is_last,
                        is_truncated=self._is_truncated,
                    )
                    tokens, ready, index = tokens[self._chunk_tokens :], ready[size:], index + 1
                    if chunk.index == 0:
                        logger.info("first chunk after %.3f s", chunk.seconds)
                    with preserved_generators(self._model.device):
                        yield chunk
                    if self._stopped():
                        return

    @torch.inference_mode()
    def _sound(
        self, blocks: Generator[torch.Tensor], seed: int
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.float32], bool]]:
        """Yield tokens, watermarked samples (in pieces of any size) and whether the piece is the last."""
        if self._look_ahead is None:
            noise, pieces = None, self._complete_mel(blocks)
        else:
            noise = torch.Generator().manual_seed((seed + _NOISE_SEED) % (MAX_SEED + 1))
            pieces = self._mel_chunks(blocks, self._look_ahead, noise)
        vocoder = self._model.vocoder.stream(noise)
        watermark = OverlappingWindows(self._watermarked, context=_WATERMARK_CONTEXT)
        count = made = 0  # tokens and samples
        with contextlib.closing(pieces):
            for tokens, mel, last in pieces:
                new = tokens.cpu().numpy()
                count += new.size
                parts = torch.split(vocoder.excite(mel, last=last), _FRAMES_PER_TOKEN * self._chunk_tokens, dim=2)
                for number, part in enumerate(parts, start=1):
                    ends = last and number == len(parts)
                    wave = vocoder.sound(part, last=ends).cpu()
                    if ends and (heard := self._model.heard_samples(count)) is not None:
                        wave = wave[: max(0, heard - made)]
                    made += wave.numel()
                    marked = watermark(wave.view(-1, _STEP).T, last=ends)
                    yield new, marked.numpy(), ends
                    new = new[:0]
                    if self._stopped():
                        return

    @torch.inference_mode()
    def _complete_mel(self, blocks: Generator[torch.Tensor]) -> Generator[Piece]:
        """Yield the spectrogram of all tokens, equal to that of `Synthesizer.synthesize`."""
        drawn = self._no_tokens()
        for block in blocks:
            drawn = torch.cat([drawn, block])
            if self._stopped():
                return
        tokens = self._synthesizer.usable(drawn)
        self._is_truncated = self._synthesizer.is_truncated(drawn)
        yield tokens, self._model.flow(tokens, self._voice, on_step=self._check), True

    @torch.inference_mode()
    def _mel_chunks(
        self, blocks: Generator[torch.Tensor], look_ahead: int, generator: torch.Generator
    ) -> Generator[Piece]:
        """Yield the spectrogram in chunks. The flow runs for each chunk with all earlier and `look_ahead` later tokens.

        A frame has the same noise in each run. At the beginning of a chunk, the output of the previous run is blended
        into that of the new run.
        """
        model, flow, voice = self._model, self._model.flow, self._voice
        noise = torch.randn((1, MAX_FRAMES, 80), generator=generator).to(model.device)
        # A voice's spectrogram may have one frame more than its tokens. The first token then has one frame less.
        surplus = voice["prompt_feat"].size(1) - _FRAMES_PER_TOKEN * voice["prompt_token"].size(1)
        drawn, count, frames = self._no_tokens(), 0, 0
        chunk = _FRAMES_PER_TOKEN * self._chunk_tokens
        wanted = chunk + _HELD_FRAMES  # enough for the complete first chunk
        tail: torch.Tensor | None = None
        last_block = drawn
        for block in blocks:
            last_block = block
            drawn = torch.cat([drawn, block[block < model.codebook]])
            if self._stopped():
                return
            known = drawn.numel() - look_ahead
            end = _FRAMES_PER_TOKEN * known - surplus
            if end - frames < wanted:
                continue
            mel = flow(drawn, voice, noise=noise, on_step=self._check)
            yield drawn[count:known], _blended(mel[..., frames:end], tail), False
            count, frames, tail, wanted = known, end, mel[..., end:], chunk
        tokens = self._synthesizer.usable(drawn)
        mel = flow(tokens, voice, noise=noise, on_step=self._check)
        self._is_truncated = self._synthesizer.is_truncated(last_block)
        yield tokens[count:], _blended(mel[..., frames:], tail), True

    def _check(self) -> None:
        if self._stopped():
            raise _StoppedError

    def _no_tokens(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64, device=self._model.device)

    @torch.inference_mode()
    def _watermarked(self, steps: torch.Tensor) -> torch.Tensor:
        """Add the watermark to samples, (240, steps), and return them as (240 steps,)."""
        samples = steps.T.reshape(-1).numpy()
        marked = self._model.marked(samples)
        if marked.shape != samples.shape:
            raise ModelError(
                f"the watermarker returned {marked.size} samples for {samples.size}",
                next_step="install the version of resemble-perth from the lock files",
            )
        return torch.from_numpy(marked)


def _blended(mel: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
    """Blend the first frames of `mel` with the frames of the previous run, `tail`; both are (1, 80, frames)."""
    if tail is None:
        return mel
    count = min(_BLENDED_FRAMES, tail.size(2), mel.size(2))
    weight = torch.linspace(0, 1, count + 2, device=mel.device)[1:-1]
    return torch.cat([torch.lerp(tail[..., :count], mel[..., :count], weight), mel[..., count:]], dim=2)
