"""Text in, watermarked speech out: upstream's `generate` with bounded tokens, an explicit voice and a seed.

Upstream keeps the voice on the model and changes it while generating, so two requests would share it. Here each call
works on a copy of its voice, and the model holds none.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions.pipeline import bound
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS, Sampling
from chatterbox_prewarm.model.text import check_text
from chatterbox_prewarm.system.limits import LEAST_TOKENS, MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from chatterbox.models.t3.modules.cond_enc import T3Cond
    from chatterbox.tts import ChatterboxTTS, Conditionals
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Speech:
    """A synthesis: speech tokens (int64, 25 a second) and watermarked mono audio (float32 within [-1, 1])."""

    tokens: NDArray[np.int64]
    samples: NDArray[np.float32]
    sample_rate: int

    @property
    def pcm(self) -> NDArray[np.int16]:
        """The audio as 16-bit samples."""
        return as_pcm(self.samples)

    @property
    def pcm_sha256(self) -> str:
        """Digest of `pcm` as little-endian bytes."""
        return hashlib.sha256(self.pcm.astype("<i2").tobytes()).hexdigest()

    @property
    def tokens_sha256(self) -> str:
        """Digest of `tokens` as little-endian int64 bytes."""
        return hashlib.sha256(self.tokens.astype("<i8").tobytes()).hexdigest()


def as_pcm(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples within [-1, 1] as 16-bit ones; what is outside is clipped."""
    scaled: NDArray[np.float32] = np.round(np.clip(samples, -1.0, 1.0) * 32767.0)
    return scaled.astype(np.int16)


def chosen_seed(seed: int | None) -> int:
    """The seed asked for, or a fresh one.

    Raises:
        BadInputError: one that the generators do not take.
    """
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise BadInputError(f"the seed is {seed}", next_step=f"give a whole number from 0 to {MAX_SEED}")
    return seed if seed is not None else random.SystemRandom().getrandbits(31)


def seed_everything(seed: int) -> None:
    """Seed all generators that a synthesis draws from: sampling, flow noise, the vocoder's source."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def preserved_generators(device: str) -> Iterator[None]:
    """Leave the generators that a synthesis on `device` draws from as they were, whatever the block draws."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # Named, since otherwise a context is made on every GPU there is.
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


class Synthesizer:
    """A loaded model and its voices. One call at a time: the model's parts keep state while they run."""

    def __init__(self, model: ChatterboxTTS, voices: Mapping[str, Conditionals]) -> None:
        self.model = model
        self.voices = dict(voices)

    def synthesize(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        seed: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> Speech:
        """Speak `text`.

        Args:
            text: what to say.
            voice: one of `voices`.
            seed: makes the result repeatable on the same machine; None draws a fresh one.
            max_new_tokens: bound on the speech tokens, 25 to a second of audio.
            sampling: how tokens are drawn.

        Raises:
            BadInputError: the text cannot be spoken, or there is no such voice.
            ModelError: the model gave too few speech tokens to make a sound of.
        """
        conditionals = self.voice(voice)
        seed_everything(chosen_seed(seed))
        with torch.inference_mode():
            tokens = self.speech_tokens(text, voice=voice, max_new_tokens=max_new_tokens, sampling=sampling)
            stages = bound(self.model)
            samples = self.watermarked(stages.vocoder(stages.flow(tokens, conditionals.gen)).cpu().numpy())
        return Speech(tokens=tokens.cpu().numpy(), samples=samples, sample_rate=self.model.sr)

    @torch.inference_mode()
    def speech_tokens(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> torch.Tensor:
        """T3's part of a synthesis, drawn from the generators as they stand; arguments and errors as `synthesize`'s.

        Returns:
            int64 of shape (n,), 25 to a second of audio, start and stop tokens dropped.
        """
        sampling = sampling or Sampling()
        conditionals, text_tokens = self._t3_inputs(text, voice, sampling)
        decoder = bound(self.model).speech_tokens
        return self.usable(decoder(conditionals, text_tokens, sampling=sampling, max_new_tokens=max_new_tokens))

    @torch.inference_mode()
    def token_blocks(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> Generator[torch.Tensor]:
        """The same as they are drawn, those included that `usable` drops; what cannot be spoken is refused at once.

        Returns:
            int64 (n,) each; see `SpeechTokens.blocks`.
        """
        sampling = sampling or Sampling()
        conditionals, text_tokens = self._t3_inputs(text, voice, sampling)
        decoder = bound(self.model).speech_tokens
        return decoder.blocks(conditionals, text_tokens, sampling=sampling, max_new_tokens=max_new_tokens)

    def usable(self, tokens: torch.Tensor) -> torch.Tensor:
        """Those of an utterance's tokens that sound.

        Raises:
            ModelError: they are too few.
        """
        # Start and stop are the first ids above the codebook; upstream drops both, and the stop token ends the loop.
        usable: torch.Tensor = tokens[tokens < self.model.t3.hp.start_speech_token]
        if usable.numel() < LEAST_TOKENS:
            raise ModelError(
                f"the model gave {usable.numel()} usable speech tokens for this text, too few for a sound",
                next_step="try again, or another text",
            )
        return usable

    def watermarked(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mono audio at the model's rate, with upstream's watermark."""
        return np.asarray(self.model.watermarker.apply_watermark(samples, sample_rate=self.model.sr), dtype=np.float32)

    def _t3_inputs(self, text: str, voice: str, sampling: Sampling) -> tuple[T3Cond, torch.Tensor]:
        """What T3 takes: the voice, and the text's tokens, int64 (1, n), start and stop tokens included."""
        from chatterbox.tts import T3Cond, punc_norm

        check_text(text, limit=None)  # the model's own bound is on tokens, below
        conditionals = self.voice(voice)
        model = self.model
        t3 = model.t3
        text_tokens = model.tokenizer.text_to_tokens(punc_norm(text)).to(model.device)
        if text_tokens.size(1) + 2 > t3.hp.max_text_tokens:
            raise BadInputError(
                f"the text has {text_tokens.size(1)} tokens, more than the model's {t3.hp.max_text_tokens - 2}",
                next_step="split it at sentences and send the parts one by one",
            )
        text_tokens = torch.nn.functional.pad(text_tokens, (1, 0), value=t3.hp.start_text_token)
        text_tokens = torch.nn.functional.pad(text_tokens, (0, 1), value=t3.hp.stop_text_token)
        emotion = conditionals.t3.emotion_adv
        if sampling.exaggeration is not None:
            emotion = torch.full_like(emotion, sampling.exaggeration)
        prompt = T3Cond(
            speaker_emb=conditionals.t3.speaker_emb,
            cond_prompt_speech_tokens=conditionals.t3.cond_prompt_speech_tokens,
            emotion_adv=emotion,
        )
        return prompt, text_tokens

    def voice(self, name: str) -> Conditionals:
        """A voice by its name.

        Raises:
            BadInputError: there is none of that name.
        """
        try:
            return self.voices[name]
        except KeyError:
            raise BadInputError(
                f"there is no voice {name!r}", next_step=f"choose one of: {', '.join(sorted(self.voices))}"
            ) from None
