"""Streaming: return speech in chunks while it is synthesized, with the tokens of `synthesize` and without seams.

S3Gen's flow attends to the complete utterance, so the first sample depends on the last token. There are two modes:

- The flow waits for the last token. The chunks then equal the audio of `Synthesizer.synthesize`; only the vocoder and
  the watermark run chunk by chunk.
- The flow looks only a few tokens ahead (`look_ahead`). Audio then arrives early. It has the same words and voice, but
  it differs from the audio of `synthesize`.

The context of the vocoder and of the watermark is shorter than half a second. They run on overlapping windows and
return the same samples as for the complete utterance.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions.overlap import OverlappingWindows
from chatterbox_prewarm.model.regions.pipeline import pipeline_of
from chatterbox_prewarm.model.regions.region import MAX_FRAMES
from chatterbox_prewarm.model.regions.vocoder import HELD_FRAMES, SAMPLES_PER_FRAME
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS, Sampling
from chatterbox_prewarm.model.synthesis import Synthesizer, as_pcm, chosen_seed, preserved_generators, seed_everything
from chatterbox_prewarm.system.limits import MAX_SEED, MIN_LOOK_AHEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from chatterbox.tts import Conditionals
    from numpy.typing import NDArray

    Piece = tuple[torch.Tensor, torch.Tensor, bool]  # tokens, their mel spectrogram, whether the piece is the last

logger = logging.getLogger(__name__)

#: One second of audio.
CHUNK_TOKENS = 25
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


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a streamed synthesis.

    Attributes:
        samples: float32 (m,) within [-1, 1], watermarked mono audio at 24 kHz.
        tokens: int64 (n,), the speech tokens of these samples, 25 per second.
        index: of the chunk, from 0.
        seconds: from the call to this chunk.
        is_last: whether this is the last chunk.
    """

    samples: NDArray[np.float32]
    tokens: NDArray[np.int64]
    index: int
    seconds: float
    is_last: bool

    @property
    def pcm(self) -> NDArray[np.int16]:
        """The audio as 16-bit samples."""
        return as_pcm(self.samples)


class HasSynthesizer(Protocol):
    """An object with a loaded model, such as the result of `load_warmup_cache`."""

    @property
    def synthesizer(self) -> Synthesizer: ...  # noqa: D102


def generate_stream(  # noqa: PLR0913 - public API with optional keyword arguments
    source: Synthesizer | HasSynthesizer,
    text: str,
    *,
    voice: str = DEFAULT_VOICE,
    seed: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    look_ahead: int | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Generator[Chunk]:
    """Synthesize `text` in chunks.

    With a seed, the tokens are those of `Synthesizer.synthesize`; without `look_ahead`, the audio is too. Closing the
    iterator stops the synthesis. Other code may use the global random generators between two chunks.

    Args:
        source: the model; only one call may run at a time.
        text: the text to speak.
        voice: one of the voices.
        seed: makes the result reproducible on the same machine; None chooses a random seed.
        max_new_tokens: maximum number of speech tokens.
        sampling: the sampling settings; None uses the defaults.
        chunk_tokens: speech tokens (40 ms each) per chunk; the last chunk may be shorter.
        look_ahead: how many tokens after a chunk the flow waits for, at least 3. None waits for all tokens.
        stopped: called every few tokens, before each step of the flow and before each chunk. If it returns True, the
            stream ends without a last chunk. It can stop the stream before the first chunk, when nothing can close
            the iterator yet.

    Raises:
        BadInputError: at the call, an argument is invalid; at a chunk, the text or the speech is too long.
        ModelError: at a chunk, the model returned too few speech tokens for audio.
    """
    called = time.perf_counter()
    synthesizer = source if isinstance(source, Synthesizer) else source.synthesizer
    if chunk_tokens < 1:
        raise BadInputError(f"a chunk of {chunk_tokens} tokens", next_step="give 1 or more; 25 tokens are one second")
    if look_ahead is not None and look_ahead < MIN_LOOK_AHEAD:
        raise BadInputError(
            f"a look ahead of {look_ahead} tokens",
            next_step=f"give {MIN_LOOK_AHEAD} or more, or None to wait for all tokens",
        )
    stream = _Stream(synthesizer, synthesizer.voice(voice), chunk_tokens, look_ahead, stopped or (lambda: False))
    blocks = synthesizer.token_blocks(text, voice=voice, max_new_tokens=max_new_tokens, sampling=sampling)
    return stream.chunks(blocks, chosen_seed(seed), called)


class _StoppedError(Exception):
    """The caller has stopped the stream."""


class _Stream:
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
        self._pipeline = pipeline_of(synthesizer.model)
        self._voice = voice.gen
        self._chunk_tokens = chunk_tokens
        self._look_ahead = look_ahead
        self._stopped = stopped

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
                    chunk = Chunk(
                        samples=ready[:size],
                        tokens=tokens[: self._chunk_tokens],
                        index=index,
                        seconds=time.perf_counter() - called,
                        is_last=last and ready.size <= size,
                    )
                    tokens, ready, index = tokens[self._chunk_tokens :], ready[size:], index + 1
                    if chunk.index == 0:
                        logger.info("first chunk after %.3f s", chunk.seconds)
                    with preserved_generators(self._synthesizer.model.device):
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
        vocoder = self._pipeline.vocoder.stream(noise)
        watermark = OverlappingWindows(self._watermarked, context=_WATERMARK_CONTEXT)
        with contextlib.closing(pieces):
            for tokens, mel, last in pieces:
                new = tokens.cpu().numpy()
                parts = torch.split(vocoder.excite(mel, last=last), _FRAMES_PER_TOKEN * self._chunk_tokens, dim=2)
                for number, part in enumerate(parts, start=1):
                    ends = last and number == len(parts)
                    wave = vocoder.sound(part, last=ends).cpu()
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
        yield tokens, self._pipeline.flow(tokens, self._voice, on_step=self._check), True

    @torch.inference_mode()
    def _mel_chunks(
        self, blocks: Generator[torch.Tensor], look_ahead: int, generator: torch.Generator
    ) -> Generator[Piece]:
        """Yield the spectrogram in chunks. The flow runs for each chunk with all earlier and `look_ahead` later tokens.

        A frame has the same noise in each run. At the beginning of a chunk, the output of the previous run is blended
        into that of the new run.
        """
        model, flow, voice = self._synthesizer.model, self._pipeline.flow, self._voice
        noise = torch.randn((1, MAX_FRAMES, 80), generator=generator).to(model.device)
        # A voice's spectrogram may have one frame more than its tokens. The first token then has one frame less.
        surplus = voice["prompt_feat"].size(1) - _FRAMES_PER_TOKEN * voice["prompt_token"].size(1)
        drawn, count, frames = self._no_tokens(), 0, 0
        chunk = _FRAMES_PER_TOKEN * self._chunk_tokens
        wanted = chunk + _HELD_FRAMES  # enough for the complete first chunk
        tail: torch.Tensor | None = None
        for block in blocks:
            drawn = torch.cat([drawn, block[block < model.t3.hp.start_speech_token]])
            if self._stopped():
                return
            known = drawn.numel() - look_ahead
            end = _FRAMES_PER_TOKEN * known - surplus
            if end - frames < wanted:
                continue
            mel = flow(drawn, voice, noise=noise, on_step=self._check)
            yield drawn[count:known], _blended(mel[..., frames:end], tail), False
            count, frames, tail, wanted = known, end, mel[..., end:], chunk
        mel = flow(self._synthesizer.usable(drawn), voice, noise=noise, on_step=self._check)
        yield drawn[count:], _blended(mel[..., frames:], tail), True

    def _check(self) -> None:
        if self._stopped():
            raise _StoppedError

    def _no_tokens(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64, device=self._synthesizer.model.device)

    @torch.inference_mode()
    def _watermarked(self, steps: torch.Tensor) -> torch.Tensor:
        """Add the watermark to samples, (240, steps), and return them as (240 steps,)."""
        samples = steps.T.reshape(-1).numpy()
        marked = self._synthesizer.watermarked(samples)
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
