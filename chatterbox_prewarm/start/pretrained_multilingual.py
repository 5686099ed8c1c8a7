"""Upstream's `ChatterboxMultilingualTTS`, loaded warm, with methods that run the compiled regions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.start.defaults import default_weights
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox
from chatterbox_prewarm.weights.record import read_variant
from chatterbox_prewarm.weights.variants import MULTILINGUAL, MULTILINGUAL_V3

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    import torch

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.weights.variants import Variant

#: The variant of each `t3_model` of upstream's main branch.
_T3_MODELS: Mapping[str, Variant] = {"v2": MULTILINGUAL, "v3": MULTILINGUAL_V3}


class PrewarmedMultilingual(PrewarmedChatterbox):
    """Upstream's `ChatterboxMultilingualTTS`, loaded with a warm state and warmed up.

    It has the methods of `PrewarmedChatterbox`, and from the first load on it is a subclass of both upstream classes.

    Example:
        >>> model = PrewarmedMultilingual.from_pretrained_with_warmup("cuda")
        >>> samples = model.generate("Bonjour.", "fr", audio_prompt_path="voice.wav")
    """

    _variant: ClassVar[Variant] = MULTILINGUAL

    @classmethod
    def from_pretrained(cls, device: str, t3_model: str | None = None) -> PrewarmedChatterbox:
        """Load and warm up the published model, as `from_pretrained_with_warmup`.

        Args:
            device: a string such as "cpu" or "cuda".
            t3_model: the version of T3, "v2" or "v3". None for that of the image, and for v2 elsewhere.

        Raises:
            BadInputError: there is no such version, or the image has a different one.
        """
        if t3_model is None:
            return cls.from_pretrained_with_warmup(device)
        return cls.from_local(default_weights(_chosen(t3_model)), device, t3_model)

    @classmethod
    def from_local(cls, ckpt_dir: str | Path, device: str, t3_model: str | None = None) -> PrewarmedChatterbox:
        """Load and warm up a checkpoint, as `from_pretrained_with_warmup`.

        Args:
            ckpt_dir: the directory of the checkpoint.
            device: a string such as "cpu" or "cuda".
            t3_model: the version of T3 that the checkpoint must have, "v2" or "v3"; None for either.

        Raises:
            BadInputError: there is no such version, or the checkpoint has a different one.
        """
        if t3_model is not None:
            wanted, found = _chosen(t3_model), read_variant(Path(ckpt_dir))
            if found != wanted:
                raise BadInputError(
                    f"{ckpt_dir} contains the variant {found.name!r}, and t3_model {t3_model!r} needs {wanted.name!r}",
                    next_step="leave out t3_model, or fetch a checkpoint with "
                    f"`chatterbox-prewarm weights fetch DIR --variant {wanted.name}`",
                )
        return cls.from_pretrained_with_warmup(device, weights=ckpt_dir)

    @classmethod
    def _inherit(cls) -> None:
        super()._inherit()
        from chatterbox.mtl_tts import ChatterboxMultilingualTTS

        if not issubclass(PrewarmedMultilingual, ChatterboxMultilingualTTS):
            PrewarmedMultilingual.__bases__ = (PrewarmedChatterbox, ChatterboxMultilingualTTS)

    def generate(  # type: ignore[override]  # noqa: PLR0913 - upstream's signature
        self,
        text: str,
        language_id: str | None,
        audio_prompt_path: str | Path | None = None,
        exaggeration: float = 0.5,
        cfg_weight: float = 0.5,
        temperature: float = 0.8,
        repetition_penalty: float | None = None,
        min_p: float = 0.05,
        top_p: float = 1.0,
    ) -> torch.Tensor:
        """Speak a text, with the arguments and the result of upstream's `generate`.

        Args:
            text: the text to speak, at most 2046 text tokens.
            language_id: the code of its language, such as "fr". None is English here; upstream then omits the token of
                the language, for which the model was not trained.
            audio_prompt_path: a reference clip; its voice stays set for later calls. By default the present voice.
            exaggeration: strength of the emotion, from 0 to 2.
            cfg_weight: weight of the classifier-free guidance, from 0.
            temperature: of the sampling.
            repetition_penalty: from 1; by default as in the installed upstream, 2.0 in the wheel.
            min_p: from 0 to 1; leaves out tokens less probable than this share of the most probable one.
            top_p: up to 1; keeps the most probable tokens that have this probability together.

        Returns:
            float32 (1, n), watermarked mono audio at `sr` Hz.

        Raises:
            BadInputError: an argument is invalid, or the text cannot be spoken in this language.
            ModelError: the model returned too few speech tokens for audio.
        """
        default = self.attached.synthesizer.model.behaviour.repetition_penalty
        sampling = Sampling(
            repetition_penalty=default if repetition_penalty is None else repetition_penalty,
            min_p=min_p,
            top_p=top_p,
            exaggeration=exaggeration,
            cfg_weight=cfg_weight,
            temperature=temperature,
        )
        return self._generate(text, language_id, audio_prompt_path, sampling)

    def generate_stream(self, text: str, language_id: str | None = None, **arguments: Any) -> Generator[Chunk]:
        """Speak a text in chunks; see `PrewarmedChatterbox.generate_stream`.

        Example:
            >>> for chunk in model.generate_stream("Bonjour.", "fr"):
            ...     play(chunk.samples)

        Args:
            text: the text to speak.
            language_id: the code of its language; None for English.
            **arguments: of `PrewarmedChatterbox.generate_stream`.

        Raises:
            BadInputError: an argument is invalid.
        """
        return super().generate_stream(text, language=language_id, **arguments)


def _chosen(t3_model: str) -> Variant:
    """Return the variant with a version of T3.

    Raises:
        BadInputError: there is no such version.
    """
    if t3_model not in tuple(_T3_MODELS):
        raise BadInputError(f"there is no t3_model {t3_model!r}", next_step=f"choose one of: {', '.join(_T3_MODELS)}")
    return _T3_MODELS[t3_model]
