"""Turn text into watermarked speech: upstream's `generate` with a token limit, an explicit voice and a seed.

Upstream stores the voice in the model, so two requests would share it. Here the voice is an argument of each call.
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
from chatterbox_prewarm.model.conditionals import T3Conditionals
from chatterbox_prewarm.model.regions.t3_blocks import STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS
from chatterbox_prewarm.model.text import check_text
from chatterbox_prewarm.system.limits import MAX_SEED, MIN_TOKENS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from numpy.typing import NDArray

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.model.sampling import Sampling


#: Of `Synthesizer.check`: the text, and the number of speech tokens, of the speech and of the voice's clip. They fill a
#: window of the watermark's Fourier transform.
_CHECKED_TEXT, _CHECKED_TOKENS = "Hi.", 4


#: What to do if the model computes values that are not finite.
_DAMAGED = "check the weights with `chatterbox-prewarm weights verify`; or start with the profile eager"


@dataclass(frozen=True, kw_only=True)
class Speech:
    """The result of a synthesis.

    Attributes:
        tokens: int64 (n,), speech tokens, 25 per second.
        samples: float32 (m,) within [-1, 1], watermarked mono audio.
        sample_rate: in Hz.
        is_truncated: whether the speech ended at the token limit instead of the stop token, so that its end may be
            missing.
    """

    tokens: NDArray[np.int64]
    samples: NDArray[np.float32]
    sample_rate: int
    is_truncated: bool = False

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
    """Convert float samples to 16-bit samples. Values outside [-1, 1] are clipped."""
    scaled: NDArray[np.float32] = np.round(np.clip(samples, -1.0, 1.0) * 32767.0)
    return scaled.astype(np.int16)


def chosen_seed(seed: int | None) -> int:
    """Return `seed`, or a random seed if it is None.

    Raises:
        BadInputError: the generators do not accept the seed.
    """
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise BadInputError(f"the seed is {seed}", next_step=f"give a whole number from 0 to {MAX_SEED}")
    return seed if seed is not None else random.SystemRandom().getrandbits(31)


def seed_everything(seed: int) -> None:
    """Seed all random generators that a synthesis uses: sampling, flow noise, the vocoder's source."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def preserved_generators(device: str) -> Iterator[None]:
    """Restore the random generators that a synthesis on `device` uses when the block ends."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # Give the device: otherwise torch would create a context on every GPU.
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


class Synthesizer:
    """A loaded model and its voices. Only one call may run at a time, because the model keeps state during a call."""

    def __init__(self, model: Model, voices: Mapping[str, Conditionals]) -> None:
        self.model = model
        self.voices = dict(voices)

    def synthesize(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        language: str | None = None,
        seed: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> Speech:
        """Synthesize `text`.

        Args:
            text: the text to speak.
            voice: one of `voices`.
            language: a code of the variant's languages; None chooses the first one.
            seed: makes the result reproducible on the same machine; None chooses a random seed.
            max_new_tokens: maximum number of speech tokens, 25 per second of audio.
            sampling: the sampling settings; None uses the model's defaults.

        Raises:
            BadInputError: the text cannot be spoken, or the voice or the language does not exist.
            ModelError: the model returned too few speech tokens for audio.
        """
        self.voice(voice)  # an unknown voice must not change the generators
        seed_everything(chosen_seed(seed))
        return self.speak(text, voice=voice, language=language, max_new_tokens=max_new_tokens, sampling=sampling)

    @torch.inference_mode()
    def speak(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        language: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> Speech:
        """Synthesize a text as `synthesize` does, but with the current state of the generators."""
        sampling = sampling or self.model.sampling
        conditionals, prompt = self._t3_inputs(text, voice, language, sampling)
        drawn = self.model.decoder(conditionals, prompt, sampling=sampling, max_new_tokens=max_new_tokens)
        tokens = self.usable(drawn)
        return Speech(
            tokens=tokens.cpu().numpy(),
            samples=self.sound(tokens, self.voice(voice)),
            sample_rate=self.model.sample_rate,
            is_truncated=self.is_truncated(drawn),
        )

    @torch.inference_mode()
    def token_blocks(
        self,
        text: str,
        *,
        voice: str = DEFAULT_VOICE,
        language: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> Generator[torch.Tensor]:
        """Draw the speech tokens of a text in blocks, with the tokens that `usable` drops. Check the arguments at once.

        Returns:
            a generator of int64 (n,), see `TokenDecoder.blocks`.
        """
        sampling = sampling or self.model.sampling
        conditionals, prompt = self._t3_inputs(text, voice, language, sampling)
        return self.model.decoder.blocks(conditionals, prompt, sampling=sampling, max_new_tokens=max_new_tokens)

    @torch.inference_mode()
    def check(self, voice: str = DEFAULT_VOICE) -> None:
        """Run every region once with little work.

        T3 draws two tokens after a few positions of a prompt, and the flow runs one step for a short clip.

        The random generators keep their state.

        Raises:
            ModelError: a sample is not finite.
        """
        conditionals, model = self.voice(voice), self.model
        gen = dict(conditionals.gen)
        gen["prompt_token"] = gen["prompt_token"][:, :_CHECKED_TOKENS]
        gen["prompt_feat"] = gen["prompt_feat"][:, : 2 * _CHECKED_TOKENS]
        with preserved_generators(model.device):
            model.decoder.check(conditionals.t3, model.text_tokens(_CHECKED_TEXT))
            # Fixed tokens, because the decoder may have drawn some that have no sound.
            tokens = torch.arange(_CHECKED_TOKENS, device=model.device)
            samples = model.marked(model.vocoder(model.flow(tokens, gen, steps=1)).cpu().numpy())
        if not np.isfinite(samples).all():
            raise ModelError("the model computes values that are not finite", next_step=_DAMAGED)

    def prepare_voices(self) -> None:
        """Compute what all texts of a voice share: first for the default voice, then for others while there is room."""
        decoder = self.model.decoder
        for name in sorted(self.voices, key=lambda name: (name != DEFAULT_VOICE, name)):
            if not decoder.has_room():
                return
            decoder.prepare_voice(self.voices[name].t3)

    def usable(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens of an utterance that are part of the codebook, and the silence that the model needs.

        Raises:
            ModelError: there are too few of them.
        """
        # Start and stop token are the first ids after the codebook. Upstream drops both.
        usable: torch.Tensor = tokens[tokens < self.model.codebook]
        if usable.numel() < MIN_TOKENS:
            raise ModelError(
                f"the model returned {usable.numel()} usable speech tokens for this text, too few for audio",
                next_step="try again, or use another text",
            )
        silence = self.model.behaviour.silence
        return torch.cat([usable, usable.new_tensor(silence)]) if silence else usable

    def is_truncated(self, drawn: torch.Tensor) -> bool:
        """Return whether drawn tokens end at the token limit: the stop token is not the last one."""
        return not drawn.numel() or int(drawn[-1]) != STOP_SPEECH_TOKEN

    @torch.inference_mode()
    def sound(self, tokens: torch.Tensor, voice: Conditionals) -> NDArray[np.float32]:
        """Render speech tokens, int64 (n,), as watermarked mono audio at the model's sample rate."""
        model = self.model
        samples = model.vocoder(model.flow(tokens, voice.gen)).cpu().numpy()
        return model.marked(samples[: model.heard_samples(len(tokens))])

    def _t3_inputs(
        self, text: str, voice: str, language: str | None, sampling: Sampling
    ) -> tuple[T3Conditionals, torch.Tensor]:
        """Return T3's inputs: the voice, and the text tokens, int64 (1, n), including start and stop tokens."""
        if sampling.top_k:
            self.model.variant.check_control("top_k")
        text = check_text(text, limit=None)  # the model limits the number of tokens instead, see below
        conditionals = self.voice(voice)
        language = self.model.variant.check_language(language)
        self.model.text.check(text, language)
        tokens = self.model.text_tokens(text, language)
        frame = self.model.text.frame
        count = tokens.size(1) - len(frame.start) - len(frame.stop)
        if count > frame.limit:
            raise BadInputError(
                f"the text has {count} tokens; the model's limit is {frame.limit}",
                next_step="split it at sentences and send the parts separately",
            )
        emotion = conditionals.t3.emotion_adv
        if sampling.exaggeration is not None:
            emotion = torch.full_like(emotion, sampling.exaggeration)
        prompt = T3Conditionals(
            speaker_emb=conditionals.t3.speaker_emb,
            cond_prompt_speech_tokens=conditionals.t3.cond_prompt_speech_tokens,
            emotion_adv=emotion,
        )
        return prompt, tokens

    def voice(self, name: str) -> Conditionals:
        """Return a voice by its name.

        Raises:
            BadInputError: no voice has this name.
        """
        try:
            return self.voices[name]
        except KeyError:
            raise BadInputError(
                f"there is no voice {name!r}", next_step=f"choose one of: {', '.join(sorted(self.voices))}"
            ) from None
