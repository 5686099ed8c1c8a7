"""Upstream's `ChatterboxTurboTTS`, loaded warm, with methods that run the compiled regions. It loads Nano, too."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from chatterbox_prewarm.start.defaults import default_weights
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox
from chatterbox_prewarm.weights.variants import NANO, TURBO

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from chatterbox_prewarm.weights.variants import Variant

logger = logging.getLogger(__name__)


class PrewarmedTurbo(PrewarmedChatterbox):
    """Upstream's `ChatterboxTurboTTS`, loaded with a warm state and warmed up. A checkpoint of Nano works, too.

    It has the methods of `PrewarmedChatterbox`, and from the first load on it is a subclass of both upstream classes.

    Example:
        >>> model = PrewarmedTurbo.from_pretrained_with_warmup("cuda")
        >>> samples = model.generate("Hi there. [chuckle]", audio_prompt_path="voice.wav")
    """

    _variant: ClassVar[Variant] = TURBO
    _more_tokens: ClassVar[int] = 1
    _norm_loudness: bool = True

    @classmethod
    def from_pretrained(cls, device: str, nano: bool = False) -> PrewarmedChatterbox:
        """Load and warm up the published model, as `from_pretrained_with_warmup`.

        Args:
            device: a string such as "cpu" or "cuda".
            nano: load Nano instead of Turbo.
        """
        return cls.from_pretrained_with_warmup(device, weights=default_weights(NANO) if nano else None)

    @classmethod
    def from_local(cls, ckpt_dir: str | Path, device: str, nano: bool = False) -> PrewarmedChatterbox:  # noqa: ARG003
        """Load and warm up a checkpoint, as `from_pretrained_with_warmup`. Its record says whether it is Nano."""
        return cls.from_pretrained_with_warmup(device, weights=ckpt_dir)

    @classmethod
    def _inherit(cls) -> None:
        super()._inherit()
        from chatterbox.tts_turbo import ChatterboxTurboTTS

        if not issubclass(PrewarmedTurbo, ChatterboxTurboTTS):
            PrewarmedTurbo.__bases__ = (PrewarmedChatterbox, ChatterboxTurboTTS)
            # `PrewarmedChatterbox` inherits shorter ones from upstream's English class, which comes before Turbo's.
            PrewarmedTurbo.ENC_COND_LEN = ChatterboxTurboTTS.ENC_COND_LEN
            PrewarmedTurbo.DEC_COND_LEN = ChatterboxTurboTTS.DEC_COND_LEN

    def prepare_conditionals(
        self, wav_fpath: str | Path, exaggeration: float = 0.5, norm_loudness: bool = True
    ) -> None:
        """Compute the voice of a reference clip and set `conds`, as upstream does, but without keeping its graph.

        Args:
            wav_fpath: a clip that is longer than 5 s.
            exaggeration: without an effect, as in upstream.
            norm_loudness: scale the clip to upstream's loudness.

        Raises:
            BadInputError: there is no such file, it is too short, or it is not audio from which a voice can be made.
        """
        self._norm_loudness = norm_loudness
        super().prepare_conditionals(wav_fpath, exaggeration)

    def _prepare_with_upstream(self, path: str | Path, exaggeration: float) -> None:
        from chatterbox.tts_turbo import ChatterboxTurboTTS

        ChatterboxTurboTTS.prepare_conditionals(self, path, exaggeration, self._norm_loudness)

    def generate(  # noqa: PLR0913 - upstream's signature
        self,
        text: str,
        repetition_penalty: float = 1.2,
        min_p: float = 0.00,
        top_p: float = 0.95,
        audio_prompt_path: str | Path | None = None,
        exaggeration: float = 0.0,
        cfg_weight: float = 0.0,
        temperature: float = 0.8,
        top_k: int = 1000,
        norm_loudness: bool = True,
    ) -> torch.Tensor:
        """Speak a text, with the arguments and the result of upstream's `generate`.

        Args:
            text: the text to speak, with tags such as "[laugh]". A text that upstream's tokenizer would cut off is
                refused.
            repetition_penalty: from 1; lowers the probability of tokens that were drawn before.
            min_p: ignored with a warning, as in upstream.
            top_p: up to 1; keeps the most probable tokens that have this probability together.
            audio_prompt_path: a reference clip, longer than 5 s; its voice stays set for later calls. By default the
                present voice.
            exaggeration: ignored with a warning, as in upstream.
            cfg_weight: ignored with a warning, as in upstream.
            temperature: of the sampling.
            top_k: keeps so many of the most probable tokens; 0 keeps all.
            norm_loudness: scale the clip to upstream's loudness.

        Returns:
            float32 (1, n), watermarked mono audio at `sr` Hz.

        Raises:
            BadInputError: an argument is invalid, or the text cannot be spoken.
            ModelError: the model returned too few speech tokens for audio.
        """
        if cfg_weight > 0.0 or exaggeration > 0.0 or min_p > 0.0:
            logger.warning("cfg_weight, exaggeration and min_p are ignored: Turbo and Nano do not have them")
        if audio_prompt_path:
            self.prepare_conditionals(audio_prompt_path, norm_loudness=norm_loudness)
        sampling = replace(
            self.attached.synthesizer.model.sampling,
            repetition_penalty=repetition_penalty,
            top_p=top_p,
            temperature=temperature,
            top_k=top_k,
        )
        return self._generate(text, None, None, sampling)
