"""Voice conversion: speak recorded speech with another voice, as upstream's `ChatterboxVC.generate`.

The speech becomes tokens, which the flow and the vocoder of a loaded model speak with the target voice. T3 is not used.
Speech of more than 40 s is cut at quiet places, because that is the longest speech that the flow computes at once for a
text. Each part has a watermark. `convert` and `stream` speak part k with the seed plus k, so the parts are independent.
`speak` lets the random generators run on, as upstream does.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import MAX_SAMPLE_RATE, MAX_SECONDS, SOURCE, check_samples
from chatterbox_prewarm.model.conditionals import Conditionals
from chatterbox_prewarm.model.model import read_tensors
from chatterbox_prewarm.model.reference_clip import reference_audio
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.t3_blocks import STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.resampling import resampled
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS
from chatterbox_prewarm.model.speech_tokenizer import SAMPLES_PER_TOKEN, TOKENIZER_RATE, SpeechTokenizer
from chatterbox_prewarm.model.stream import Stream
from chatterbox_prewarm.model.streaming import CHUNK_TOKENS, check_chunks
from chatterbox_prewarm.model.synthesis import Speech, Synthesizer, chosen_seed, seed_everything
from chatterbox_prewarm.system.limits import MAX_SEED
from chatterbox_prewarm.weights.mapped import SPEECH_TOKENIZER, MappedWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from numpy.typing import NDArray

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.model.model import Model

#: Samples of a recording are within [-1, 1]. Larger ones than this are integers that were not scaled.
_MAX_PEAK = 32.0
#: The longest part, 40 s, and the shortest one at the end, 1 s.
_PART_TOKENS, _LAST_TOKENS = MAX_NEW_TOKENS, 25
#: The longest part of a stream with a look ahead, 10 s. For each of its chunks, the flow runs again from the beginning
#: of the part, so a part of 40 s would take 20 times as long as without a look ahead.
_PART_TOKENS_WITH_LOOK_AHEAD = 250
#: How many tokens a stream gets at once. With a look ahead, the flow can run after each block.
_BLOCK_TOKENS = 5
#: The speech that the check of a start turns into tokens, in seconds.
_CHECKED_SECONDS = 0.2


class Converter:
    """Converts speech to another voice. Only one call of it or of the model may run at a time.

    Args:
        model: a loaded model.
        tokenizer: turns speech into tokens.
    """

    def __init__(self, model: Model, tokenizer: SpeechTokenizer) -> None:
        # Upstream leaves out the audio of the last token, and adds silence, only where T3 drew the tokens.
        heard = replace(model.behaviour, dropped_tokens=0, silence=())
        self._synthesizer = Synthesizer(replace(model, behaviour=heard), {})
        self._tokenizer = tokenizer

    @torch.inference_mode()
    def check(self) -> None:
        """Turn a moment of speech into tokens, which runs the tokenizer once. `Synthesizer.check` runs the rest.

        Raises:
            ModelError: its result is not a sequence of speech tokens.
        """
        tokens = self._tokenizer(torch.from_numpy(reference_audio(_CHECKED_SECONDS, TOKENIZER_RATE)))
        codebook = self._synthesizer.model.codebook
        if (
            tokens.numel() != round(_CHECKED_SECONDS * TOKENIZER_RATE / SAMPLES_PER_TOKEN)
            or int(tokens.max()) >= codebook
        ):
            raise ModelError(
                f"the speech tokenizer returns {tokens.tolist()}",
                next_step="check the weights with `chatterbox-prewarm weights verify`",
            )

    def convert(
        self, samples: NDArray[np.float32], sample_rate: int, voice: Conditionals, *, seed: int | None = None
    ) -> Speech:
        """Speak recorded speech with another voice.

        Args:
            samples: float32 (n,) mono, 0.12 s to 300 s, not silent.
            sample_rate: in Hz, 8,000 to 192,000.
            voice: the target voice. Only `voice.gen` is used.
            seed: makes the result reproducible on the same machine; None chooses a random seed.

        Returns:
            speech with the duration of the source, rounded to 40 ms.

        Raises:
            BadInputError: the samples, the sample rate or the seed cannot be used.
        """
        return self._converted(samples, sample_rate, voice, chosen_seed(seed))

    def speak(self, samples: NDArray[np.float32], sample_rate: int, voice: Conditionals) -> Speech:
        """Speak recorded speech as `convert` does, but with the current state of the random generators."""
        return self._converted(samples, sample_rate, voice, None)

    def _converted(
        self, samples: NDArray[np.float32], sample_rate: int, voice: Conditionals, seed: int | None
    ) -> Speech:
        parts = self._parts(_prepared(samples, sample_rate), _PART_TOKENS, lambda: False)
        spoken = []
        for number, part in enumerate(parts):
            if seed is not None:
                seed_everything(_part_seed(seed, number))
            spoken.append(self._synthesizer.sound(part, _part_voice(voice, number)))
        return Speech(
            tokens=torch.cat(parts).cpu().numpy(),
            samples=np.concatenate(spoken),
            sample_rate=self._synthesizer.model.sample_rate,
        )

    def stream(  # noqa: PLR0913 - public API with optional keyword arguments
        self,
        samples: NDArray[np.float32],
        sample_rate: int,
        voice: Conditionals,
        *,
        seed: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        look_ahead: int | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Generator[Chunk]:
        """Speak recorded speech with another voice, in chunks.

        Without `look_ahead`, the audio equals the audio of `convert`. The last chunk of each part may be shorter.

        Args:
            samples: see `convert`.
            sample_rate: see `convert`.
            voice: see `convert`.
            seed: see `convert`.
            chunk_tokens: see `generate_stream`.
            look_ahead: see `generate_stream`.
            stopped: see `generate_stream`.

        Raises:
            BadInputError: at the call, an argument cannot be used.
        """
        called = time.perf_counter()
        check_chunks(chunk_tokens, look_ahead)
        seed, prepared = chosen_seed(seed), _prepared(samples, sample_rate)
        stopped = stopped or (lambda: False)

        def chunks_of(part: torch.Tensor, number: int) -> Generator[Chunk]:
            stream = Stream(self._synthesizer, _part_voice(voice, number), chunk_tokens, look_ahead, stopped)
            return stream.chunks(_blocks(part), _part_seed(seed, number), called)

        longest = _PART_TOKENS if look_ahead is None else _PART_TOKENS_WITH_LOOK_AHEAD
        return self._chunks(prepared, longest, chunks_of, stopped)

    def _chunks(
        self,
        prepared: NDArray[np.float32],
        longest: int,
        chunks_of: Callable[[torch.Tensor, int], Generator[Chunk]],
        stopped: Callable[[], bool],
    ) -> Generator[Chunk]:
        """Yield the chunks of all parts of at most `longest` tokens, numbered from 0."""
        parts, index = self._parts(prepared, longest, stopped), 0
        for number, part in enumerate(parts):
            with contextlib.closing(chunks_of(part, number)) as chunks:
                for chunk in chunks:
                    yield replace(chunk, index=index, is_last=chunk.is_last and number == len(parts) - 1)
                    index += 1
            if stopped():
                return

    @torch.inference_mode()
    def _parts(self, prepared: NDArray[np.float32], longest: int, stopped: Callable[[], bool]) -> list[torch.Tensor]:
        """Return the tokens of each part of prepared samples: int64 (n,). Return no parts if `stopped` returns True."""
        windows = []
        for window in self._tokenizer.windows(torch.from_numpy(prepared)):
            if stopped():
                return []
            windows.append(window)
        tokens = torch.cat(windows).to(self._synthesizer.model.device)
        return list(torch.split(tokens, part_lengths(prepared, tokens.numel(), longest)))


def load_converter(model: Model, weights: Path) -> Converter:
    """Make a converter for a loaded model.

    A model that was loaded to speak texts lacks the speech tokenizer, which is mapped here. On a CPU its tensors are
    mapped pages of the file: 0.5 GB with the published weights.

    Example:
        >>> model = load(weights, converts=True)
        >>> converter = load_converter(model, weights)
        >>> speech = converter.convert(samples, 24_000, read_builtin_voice(weights), seed=1)

    Args:
        model: a model of these weights. Its tensors are shared.
        weights: the directory of the checkpoint.

    Raises:
        WeightsError: a file is not a safetensors file, or lacks a tensor.
        OSError: a file cannot be opened.
    """
    name, tensors = "s3gen.tokenizer.", model.tensors
    if not any(tensor.startswith(name) for tensor in tensors):
        mapped = MappedWeights(weights, model.variant, SPEECH_TOKENIZER)
        mapped.populate()
        tensors = dict(read_tensors(mapped, model.device, None))
    tokenizer = SpeechTokenizer(
        NamedTensors(tensors, name), mel_filters=tensors.get(f"{name}_mel_filters"), window=tensors.get(f"{name}window")
    )
    return Converter(model, tokenizer)


def part_lengths(samples: NDArray[np.float32], tokens: int, limit: int = _PART_TOKENS) -> list[int]:
    """Choose where to cut speech: between the two neighbouring tokens with the least energy.

    Args:
        samples: float32 (n,), 16 kHz.
        tokens: the number of tokens of the samples.
        limit: the longest part. All but the last one have at least half of it, or 1 s less.

    Returns:
        the number of tokens of each part, at least 25 (1 s) if there are several parts.
    """
    padded = np.pad(samples, (0, max(0, tokens * SAMPLES_PER_TOKEN - samples.size)))[: tokens * SAMPLES_PER_TOKEN]
    energies = np.square(padded).reshape(tokens, SAMPLES_PER_TOKEN).sum(axis=1)
    lengths, begin = [], 0
    while (left := tokens - begin) > limit:
        longest = min(limit, left - _LAST_TOKENS)
        cuts = np.arange(longest, limit // 2 - 1, -1)  # the longest part first, which wins if all are equal
        lengths.append(int(cuts[np.argmin(energies[begin + cuts - 1] + energies[begin + cuts])]))
        begin += lengths[-1]
    return [*lengths, tokens - begin]


def _prepared(samples: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """Check samples, and resample them to 16 kHz.

    Raises:
        BadInputError: they cannot be used.
    """
    what = SOURCE.what
    if not SOURCE.min_sample_rate <= sample_rate <= MAX_SAMPLE_RATE:
        raise BadInputError(
            f"{what} is sampled at {sample_rate} Hz; {SOURCE.min_sample_rate} to {MAX_SAMPLE_RATE} Hz are needed",
            next_step=SOURCE.rate_step,
        )
    if samples.ndim != 1 or samples.dtype != np.float32:
        raise BadInputError(
            f"{what} is an array of {samples.dtype} with the shape {samples.shape}; float32 (n,) is needed",
            next_step="mix it down to one channel, and convert it to float32 within [-1, 1]",
        )
    seconds = samples.size / sample_rate
    if not SOURCE.min_seconds <= seconds <= MAX_SECONDS:
        raise BadInputError(
            f"{what} is {seconds:.2f} s long; {SOURCE.min_seconds:g} to {MAX_SECONDS:.0f} s are needed",
            next_step=SOURCE.length_step,
        )
    check_samples(samples, what=what, speech_step=SOURCE.speech_step)
    if (peak := float(np.abs(samples).max())) > _MAX_PEAK:
        raise BadInputError(
            f"{what} has samples up to {peak:.0f}; the full scale is 1", next_step="divide 16-bit samples by 32768"
        )
    return resampled(samples, sample_rate, TOKENIZER_RATE)


def _part_seed(seed: int, number: int) -> int:
    return (seed + number) % (MAX_SEED + 1)


def _part_voice(voice: Conditionals, number: int) -> Conditionals:
    """Return the voice of a part. The spectrogram of a voice may have one frame more than its tokens.

    The flow then drops the first frame of the speech, as in upstream. That must not add up over the parts.
    """
    if number == 0:
        return voice
    frames = 2 * voice.gen["prompt_token"].size(1)
    return Conditionals(t3=voice.t3, gen={**voice.gen, "prompt_feat": voice.gen["prompt_feat"][:, :frames]})


def _blocks(tokens: torch.Tensor) -> Generator[torch.Tensor]:
    """Yield tokens as T3 would draw them: a few at a time, with the stop token at the end."""
    yield from torch.split(torch.cat([tokens, tokens.new_full((1,), STOP_SPEECH_TOKEN)]), _BLOCK_TOKENS)
