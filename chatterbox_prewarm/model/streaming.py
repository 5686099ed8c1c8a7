"""Speech in chunks while it is made: the same tokens as in one piece, and a sound without seams.

S3Gen's flow attends to the whole utterance, later tokens included, so the first sound depends on the last token. Either
the flow waits for the last token: then the chunks are the very audio of `Synthesizer.synthesize`, and only vocoder and
watermark run chunk by chunk. Or it looks but a few tokens ahead: then sound comes early, of the same words and voice,
but it is another rendition. The vocoder and the watermark see less than half a second; they run on overlapping windows
and give what they would give for the whole.
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
from chatterbox_prewarm.model.regions.overlap import Windows
from chatterbox_prewarm.model.regions.pipeline import bound
from chatterbox_prewarm.model.regions.region import MOST_FRAMES
from chatterbox_prewarm.model.regions.vocoder import HELD_FRAMES, SAMPLES_PER_FRAME
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS, Sampling
from chatterbox_prewarm.model.synthesis import Synthesizer, as_pcm, chosen_seed, preserved_generators, seed_everything
from chatterbox_prewarm.system.limits import LEAST_LOOK_AHEAD, MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from chatterbox.tts import Conditionals
    from numpy.typing import NDArray

    Piece = tuple[torch.Tensor, torch.Tensor, bool]  # tokens, their mel spectrogram, whether it is the last

logger = logging.getLogger(__name__)

#: A second of audio.
CHUNK_TOKENS = 25
_FRAMES_PER_TOKEN = 2
#: Over how many mel frames one rendering of the flow goes over into the next.
_BLENDED_FRAMES = 6
#: The watermark is made from steps of 10 ms. Perth's encoder sees 15 of them to each side, its two Fourier transforms
#: 3.2 each, and its resamplers some hundred samples.
_STEP = 240
_WATERMARK_CONTEXT = 24
#: Mel frames that the vocoder and the watermark hold back between them.
_HELD_FRAMES = HELD_FRAMES + _WATERMARK_CONTEXT * _STEP // SAMPLES_PER_FRAME
#: Noise of its own for a stream that looks ahead, from the same seed.
_NOISE_SEED = 0x9E3779B9


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a streamed synthesis.

    Attributes:
        samples: watermarked mono audio at the model's rate, 24 kHz, within [-1, 1].
        tokens: the speech tokens that it is the sound of, int64, 25 a second.
        index: 0 for the first.
        seconds: from the call to this chunk.
        is_last: that none follows.
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


def generate_stream(
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
    """Speak `text` in chunks.

    With a seed the tokens are those that `Synthesizer.synthesize` draws, and without `look_ahead` the audio is too.
    Closing the iterator ends the work. What others draw from the global generators between two chunks changes nothing.

    Args:
        source: what speaks, one call at a time.
        text: what to say.
        voice: one of the voices.
        seed: makes the result repeatable on the same machine; None draws a fresh one.
        max_new_tokens: bound on the speech tokens.
        sampling: how tokens are drawn.
        chunk_tokens: speech tokens to a chunk, 40 ms each; the last chunk may be shorter.
        look_ahead: how many tokens after a chunk the flow waits for, at least 3. None waits for all.
        stopped: asked every few tokens, before each step of the flow and before each chunk, also while the first is
            being made and nobody can close the iterator; when it says yes the stream ends, without a last chunk.

    Raises:
        BadInputError: at the call, an argument that cannot be used; at a chunk, a text or a speech that is too long.
        ModelError: at a chunk, the model gave too few speech tokens to make a sound of.
    """
    called = time.perf_counter()
    synthesizer = source if isinstance(source, Synthesizer) else source.synthesizer
    if chunk_tokens < 1:
        raise BadInputError(f"a chunk of {chunk_tokens} tokens", next_step="give 1 or more; 25 are a second")
    if look_ahead is not None and look_ahead < LEAST_LOOK_AHEAD:
        raise BadInputError(
            f"a look ahead of {look_ahead} tokens", next_step=f"give {LEAST_LOOK_AHEAD} or more, or None for all"
        )
    stream = _Stream(synthesizer, synthesizer.voice(voice), chunk_tokens, look_ahead, stopped or (lambda: False))
    blocks = synthesizer.token_blocks(text, voice=voice, max_new_tokens=max_new_tokens, sampling=sampling)
    return stream.chunks(blocks, chosen_seed(seed), called)


class _StoppedError(Exception):
    """Nobody wants the rest."""


class _Stream:
    """One streamed synthesis; the arguments are those of `generate_stream`."""

    def __init__(
        self,
        synthesizer: Synthesizer,
        voice: Conditionals,
        chunk_tokens: int,
        look_ahead: int | None,
        stopped: Callable[[], bool],
    ) -> None:
        self._synthesizer = synthesizer
        self._stages = bound(synthesizer.model)
        self._voice = voice.gen
        self._chunk_tokens = chunk_tokens
        self._look_ahead = look_ahead
        self._stopped = stopped

    def chunks(self, blocks: Generator[torch.Tensor], seed: int, called: float) -> Generator[Chunk]:
        """Make the chunks from the tokens as they are drawn."""
        with contextlib.suppress(_StoppedError):
            yield from self._chunks(blocks, seed, called)

    # Inference mode is left while a chunk is out: it would hold in the code of whoever asked for it.
    @torch.inference_mode()
    def _chunks(self, blocks: Generator[torch.Tensor], seed: int, called: float) -> Generator[Chunk]:
        seed_everything(seed)
        size = _FRAMES_PER_TOKEN * SAMPLES_PER_FRAME * self._chunk_tokens
        tokens, ready, index = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), 0
        with contextlib.closing(blocks), contextlib.closing(self._sound(blocks, seed)) as sound:
            for more_tokens, samples, last in sound:
                tokens, ready = np.concatenate([tokens, more_tokens]), np.concatenate([ready, samples])
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
                        logger.info("the first chunk of speech after %.3f s", chunk.seconds)
                    with preserved_generators(self._synthesizer.model.device):
                        yield chunk
                    if self._stopped():
                        return

    @torch.inference_mode()
    def _sound(
        self, blocks: Generator[torch.Tensor], seed: int
    ) -> Generator[tuple[NDArray[np.int64], NDArray[np.float32], bool]]:
        """Watermarked samples in pieces of any size, the tokens that came with them, and whether it is all."""
        if self._look_ahead is None:
            noise, pieces = None, self._whole(blocks)
        else:
            noise = torch.Generator().manual_seed((seed + _NOISE_SEED) % (MAX_SEED + 1))
            pieces = self._settled(blocks, self._look_ahead, noise)
        vocoder = self._stages.vocoder.stream(noise)
        watermark = Windows(self._watermarked, context=_WATERMARK_CONTEXT)
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
    def _whole(self, blocks: Generator[torch.Tensor]) -> Generator[Piece]:
        """The spectrogram of all tokens, as `Synthesizer.synthesize` makes it."""
        drawn = self._no_tokens()
        for block in blocks:
            drawn = torch.cat([drawn, block])
            if self._stopped():
                return
        tokens = self._synthesizer.usable(drawn)
        yield tokens, self._stages.flow(tokens, self._voice, on_step=self._check), True

    @torch.inference_mode()
    def _settled(
        self, blocks: Generator[torch.Tensor], look_ahead: int, generator: torch.Generator
    ) -> Generator[Piece]:
        """The spectrogram chunk by chunk, each rendered with all tokens before it and `look_ahead` after it.

        A frame's noise is the same in each rendering. Where a chunk begins, the rendering of the one before goes over
        into its own.
        """
        model, flow, voice = self._synthesizer.model, self._stages.flow, self._voice
        noise = torch.randn((1, MOST_FRAMES, 80), generator=generator).to(model.device)
        # A voice's spectrogram may have a frame more than its tokens, which the first one then lacks.
        surplus = voice["prompt_feat"].size(1) - _FRAMES_PER_TOKEN * voice["prompt_token"].size(1)
        drawn, count, frames = self._no_tokens(), 0, 0
        chunk = _FRAMES_PER_TOKEN * self._chunk_tokens
        wanted = chunk + _HELD_FRAMES  # so that the first rendering is enough for the first chunk
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
        """Samples (240, steps) to as many with the watermark, (240 steps,)."""
        samples = steps.T.reshape(-1).numpy()
        marked = self._synthesizer.watermarked(samples)
        if marked.shape != samples.shape:
            raise ModelError(
                f"the watermarker gave {marked.size} samples for {samples.size}",
                next_step="install the release of resemble-perth that the locks name",
            )
        return torch.from_numpy(marked)


def _blended(mel: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
    """A rendering whose first frames go over from another one of them, both (1, 80, frames)."""
    if tail is None:
        return mel
    count = min(_BLENDED_FRAMES, tail.size(2), mel.size(2))
    weight = torch.linspace(0, 1, count + 2, device=mel.device)[1:-1]
    return torch.cat([torch.lerp(tail[..., :count], mel[..., :count], weight), mel[..., count:]], dim=2)
