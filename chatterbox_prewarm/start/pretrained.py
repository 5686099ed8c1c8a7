"""Upstream's `ChatterboxTTS`, loaded warm, with methods that run the compiled regions."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from chatterbox_prewarm.errors import BadInputError, first_line
from chatterbox_prewarm.families.registry import applicable
from chatterbox_prewarm.model.chatterbox_imports import free_import_frames, require_upstream
from chatterbox_prewarm.model.clips import DEFAULT_VOICE, decoded_clip, existing_file, has_no_length
from chatterbox_prewarm.model.sampling import MAX_NEW_TOKENS, Sampling
from chatterbox_prewarm.model.warmup.settings import switched_off
from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
from chatterbox_prewarm.start.attach import Attached, attach_baked, checked
from chatterbox_prewarm.start.defaults import default_options
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.start.upstream import attach_upstream
from chatterbox_prewarm.start.voices import make_missing_voices
from chatterbox_prewarm.system.limits import SAMPLING
from chatterbox_prewarm.weights.record import read_record
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, get_variant

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import torch
    from chatterbox.tts import ChatterboxTTS as _Base
    from chatterbox.tts import Conditionals as UpstreamConditionals

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.model.synthesis import Synthesizer
    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.system.metrics import StartMetrics
    from chatterbox_prewarm.weights.variants import Variant

else:

    class _Base:
        """Takes the place of upstream's class until a model is loaded, because `prepare` comes before its import."""


logger = logging.getLogger(__name__)

#: What upstream speaks when the text is empty.
_NO_TEXT = "You need to add some text for me to talk."


class PrewarmedChatterbox(_Base):  # type: ignore[misc]  # upstream has no types
    """Upstream's `ChatterboxTTS`, loaded with a warm state and warmed up.

    `generate` and the streams run the compiled regions. Everything else is as in upstream's class, of which this is a
    subclass from the first load on. Only one call may run at a time, as in upstream's class.

    Example:
        >>> model = PrewarmedChatterbox.from_pretrained_with_warmup("cuda")
        >>> samples = model.generate("Hello.", audio_prompt_path="voice.wav")
        >>> torchaudio.save("hello.wav", samples, model.sr)

    Attributes:
        warmup_completed: whether the warm-up ran to its end.
    """

    _variant: ClassVar[Variant] = DEFAULT_VARIANT
    #: How many tokens more than `MAX_NEW_TOKENS` upstream's `generate` draws.
    _more_tokens: ClassVar[int] = 0
    _start: Attached
    warmup_completed: bool
    conds: UpstreamConditionals | None

    @classmethod
    def from_pretrained_with_warmup(  # noqa: PLR0913 - public API with optional keyword arguments
        cls,
        device: str = "cpu",
        warmup: bool = True,
        *,
        weights: str | Path | None = None,
        warm: str | Path | None = None,
        cache: str | Path | None = None,
        policy: str = "fallback",
        strategy: ChatterboxWarmupStrategy | None = None,
        plain_text: Sequence[str] = (),
    ) -> PrewarmedChatterbox:
        """Load the model with its warm state, and warm it up.

        The warm-up runs every region once, in a very short synthesis, if every applicable family of the state can be
        used, and otherwise the complete `ChatterboxWarmupStrategy`.

        Args:
            device: as upstream takes it, a string such as "cpu" or "cuda".
            warmup: whether to warm up now.
            weights: the directory of a checkpoint. By default the path in an image, or a directory below the user's
                cache directory, into which an incomplete checkpoint is downloaded.
            warm: a warm state, or a folder of several. By default the path in an image; elsewhere the
                model starts cold.
            cache: a writable directory for compilers and Numba; by default below the user's cache directory.
            policy: what to do with a warm state that does not fit; see `StartOptions`.
            strategy: the warm-up to run in every case.
            plain_text: languages whose texts may lack the marks that their pronunciation needs: "he" and "ru".

        Returns:
            the model, with its built-in voice set.

        Raises:
            BadInputError: the checkpoint is of another variant.
            PrewarmError: as `check_device`, `default_weights`, `prepare`, `attach` and `checked`.
        """
        require_upstream()
        options = default_options(
            cls._variant, device, weights=weights, warm=warm, cache=cache, policy=policy, plain_text=plain_text
        )
        cls._check_variant(options.weights)
        attached = attach_baked(prepare(options))
        upstream = make_missing_voices(attached.synthesizer, attached.prepared, {})
        if attached.untried:
            upstream = None  # it shares the tensors of a model that may be replaced
            with attached.metrics.phase("first synthesis"):
                attached = checked(attached)
        model = cls._from_attached(attached, upstream)
        free_import_frames()
        if warmup:
            model._warm_up(strategy)
            model.metrics.mark("ready")
        return model

    @classmethod
    def from_pretrained(cls, device: str) -> PrewarmedChatterbox:
        """Load and warm up the published model, as `from_pretrained_with_warmup`."""
        return cls.from_pretrained_with_warmup(device)

    @classmethod
    def from_local(cls, ckpt_dir: str | Path, device: str) -> PrewarmedChatterbox:
        """Load and warm up a checkpoint, as `from_pretrained_with_warmup`."""
        return cls.from_pretrained_with_warmup(device, weights=ckpt_dir)

    @classmethod
    def _from_attached(cls, attached: Attached, upstream: _Base | None) -> PrewarmedChatterbox:
        """Turn upstream's model into one of this class; load it unless a missing voice needed it already."""
        synthesizer = attached.synthesizer
        upstream = upstream or attach_upstream(attached.prepared, lean=synthesizer.model)

        from chatterbox_prewarm.model.t3_backend import keep_backend
        from chatterbox_prewarm.model.voices import for_upstream

        cls._inherit()
        model: Any = upstream
        model.__class__ = cls
        keep_backend(model.t3)
        # What upstream's model needed belongs to this start.
        model._start = attached.judged_again()
        model.warmup_completed = False
        model.conds = for_upstream(synthesizer.voices[DEFAULT_VOICE])
        prewarmed: PrewarmedChatterbox = model
        return prewarmed

    @classmethod
    def _inherit(cls) -> None:
        """Make this class a subclass of upstream's, which is imported by now."""
        from chatterbox.tts import ChatterboxTTS

        if not issubclass(PrewarmedChatterbox, ChatterboxTTS):
            PrewarmedChatterbox.__bases__ = (ChatterboxTTS,)

    @classmethod
    def _check_variant(cls, weights: Path) -> None:
        """Refuse a checkpoint of another variant.

        Raises:
            BadInputError: see above.
            WeightsError: there is no checkpoint.
        """
        variant = get_variant(read_record(weights).variant)
        if variant.module != cls._variant.module:
            raise BadInputError(
                f"{weights} contains the variant {variant.name!r}, and {cls.__name__} loads {cls._variant.name!r}",
                next_step="use the class of that variant: PrewarmedChatterbox, PrewarmedMultilingual or PrewarmedTurbo",
            )

    def _warm_up(self, strategy: ChatterboxWarmupStrategy | None) -> None:
        prepared = self._start.prepared
        wanted = applicable(prepared.execution.profile, prepared.options.device)
        if strategy is None and set(wanted) <= set(prepared.usable):
            self.warmup_completed = self._check()
            return
        strategy = strategy or ChatterboxWarmupStrategy(metrics=self.metrics)
        strategy.perform_full_warmup(self)
        self.warmup_completed = strategy.warmup_completed

    def _check(self) -> bool:
        """Run every region once with little work, as a server does before it is ready. Return whether that happened."""
        if switched_off():
            return False
        with self.metrics.phase("first synthesis"):
            self.synthesizer.check()
        return True

    @property
    def attached(self) -> Attached:
        """The start of this model: its warm state, its misses, and the baked voices."""
        return self._start

    @property
    def metrics(self) -> StartMetrics:
        """The event log and counters of this start."""
        return self._start.metrics

    @property
    def synthesizer(self) -> Synthesizer:
        """A synthesizer with the model's present voice under the name "default", and the baked voices.

        Raises:
            BadInputError: the model has no voice.
        """
        from chatterbox_prewarm.model.synthesis import Synthesizer
        from chatterbox_prewarm.model.voices import detached

        if self.conds is None:
            raise BadInputError(
                "the model has no voice", next_step="call prepare_conditionals, or give audio_prompt_path"
            )
        baked = self._start.synthesizer
        return Synthesizer(baked.model, {**baked.voices, DEFAULT_VOICE: detached(self.conds)})

    def prepare_conditionals(self, wav_fpath: str | Path, exaggeration: float = 0.5) -> None:
        """Compute the voice of a reference clip and set `conds`, as upstream does, but without keeping its graph.

        Raises:
            BadInputError: there is no such file, or it is not audio from which a voice can be made.
        """
        import torch
        from audioread import DecodeError

        from chatterbox_prewarm.model.voices import detached, for_upstream

        step = "give the path of an audio file with 5 to 10 s of clean speech"
        existing_file(wav_fpath, what=f"the clip {wav_fpath}", next_step=step)
        try:
            with torch.inference_mode(), contextlib.ExitStack() as stack:
                path: str | Path = wav_fpath
                longer_than = self._variant.clip_seconds  # upstream's error is an assertion
                if longer_than or has_no_length(Path(path)):
                    decoded = decoded_clip(Path(path), what=f"the clip {path}", channels=2, longer_than=longer_than)
                    path = stack.enter_context(decoded)
                self._prepare_with_upstream(path, exaggeration)
                self.conds = for_upstream(detached(self.conds))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, EOFError, OSError, DecodeError) as error:
            raise BadInputError(
                f"no voice could be made from {wav_fpath}: {first_line(error)}", next_step=step
            ) from error

    def _prepare_with_upstream(self, path: str | Path, exaggeration: float) -> None:
        super().prepare_conditionals(path, exaggeration=exaggeration)

    def generate(  # noqa: PLR0913 - upstream's signature
        self,
        text: str,
        repetition_penalty: float = 1.2,
        min_p: float = 0.05,
        top_p: float = 1.0,
        audio_prompt_path: str | Path | None = None,
        exaggeration: float = 0.5,
        cfg_weight: float = 0.5,
        temperature: float = 0.8,
    ) -> torch.Tensor:
        """Speak a text, with the arguments and the result of upstream's `generate`.

        The random numbers come from the global generators: `torch.manual_seed` makes the result repeatable.

        Args:
            text: the text to speak, at most 2046 text tokens.
            repetition_penalty: from 1; lowers the probability of tokens that were drawn before.
            min_p: from 0 to 1; leaves out tokens less probable than this share of the most probable one.
            top_p: up to 1; keeps the most probable tokens that have this probability together.
            audio_prompt_path: a reference clip; its voice stays set for later calls. By default the present voice.
            exaggeration: strength of the emotion, from 0 to 2.
            cfg_weight: weight of the classifier-free guidance, from 0.
            temperature: of the sampling.

        Returns:
            float32 (1, n), watermarked mono audio at `sr` Hz.

        Raises:
            BadInputError: an argument is invalid.
            ModelError: the model returned too few speech tokens for audio.
        """
        sampling = Sampling(
            repetition_penalty=repetition_penalty,
            min_p=min_p,
            top_p=top_p,
            exaggeration=exaggeration,
            cfg_weight=cfg_weight,
            temperature=temperature,
        )
        return self._generate(text, None, audio_prompt_path, sampling)

    def _generate(
        self, text: str, language: str | None, audio_prompt_path: str | Path | None, sampling: Sampling
    ) -> torch.Tensor:
        """Speak a text as upstream's `generate` does, with a warning if the speech reaches the token limit."""
        import torch

        self._set_voice(audio_prompt_path, sampling.exaggeration)
        if text == "":
            text = _NO_TEXT
        elif isinstance(text, str) and not text.strip():
            text = "."  # as upstream normalizes it
        limit = MAX_NEW_TOKENS + self._more_tokens
        speech = self.synthesizer.speak(text, language=language, max_new_tokens=limit, sampling=sampling)
        if speech.is_truncated:
            logger.warning(
                "the speech reached the limit of %d speech tokens (25 per second), so its end may be missing; split "
                "the text at sentences, and generate the parts separately",
                limit,
            )
        return torch.from_numpy(speech.samples).unsqueeze(0)

    def generate_stream(
        self, text: str, *, audio_prompt_path: str | Path | None = None, **arguments: Any
    ) -> Generator[Chunk]:
        """Speak a text in chunks.

        Example:
            >>> for chunk in model.generate_stream("A long text.", temperature=0.7):
            ...     play(chunk.samples)

        Args:
            text: the text to speak.
            audio_prompt_path: a reference clip, as for `generate`.
            **arguments: the sampling settings of `generate`, and the arguments of the function `generate_stream`, such
                as `seed`, `chunk_tokens` and `look_ahead`.

        Raises:
            BadInputError: an argument is invalid.
        """
        from chatterbox_prewarm.model.streaming import generate_stream

        settings = {name: arguments.pop(name) for name in SAMPLING if name in arguments}
        sampling = replace(self.synthesizer.model.sampling, **{"exaggeration": 0.5, **settings})
        self._set_voice(audio_prompt_path, sampling.exaggeration)
        return generate_stream(self, text, sampling=sampling, **arguments)

    def generate_stream_with_warmup_check(
        self, text: str, *, policy: str | None = None, **arguments: Any
    ) -> Generator[Chunk]:
        """Speak a text in chunks, after a warning if the model is not warm.

        Args:
            text: the text to speak.
            policy: what to do if the start had misses; see the function `generate_stream_with_warmup_check`.
            **arguments: of the method `generate_stream`.

        Raises:
            NotWarmError: under "require", there were misses.
            BadInputError: an argument is invalid.
        """
        from chatterbox_prewarm.start.streaming import check_warm

        if not self.warmup_completed:
            logger.warning("the model is not warmed up, so the first chunk comes late; load it with warmup=True")
        check_warm(self.attached, policy)
        return self.generate_stream(text, **arguments)

    def save_warmup_cache(self, cache_path: str | Path) -> Manifest:
        """Write the warm state of this model into a new or empty directory; see the function of this name."""
        from chatterbox_prewarm.start.save import save_warmup_cache

        return save_warmup_cache(self.attached, cache_path)

    def _set_voice(self, audio_prompt_path: str | Path | None, exaggeration: float | None) -> None:
        if audio_prompt_path:
            self.prepare_conditionals(audio_prompt_path, exaggeration=0.5 if exaggeration is None else exaggeration)


def from_pretrained_with_warmup(
    device: str = "cpu",
    warmup: bool = True,
    **arguments: Any,
) -> PrewarmedChatterbox:
    """Load the English model warm; see `PrewarmedChatterbox.from_pretrained_with_warmup`.

    `PrewarmedMultilingual` and `PrewarmedTurbo` have the same method for the other models.

    Example:
        >>> model = from_pretrained_with_warmup("cuda")
        >>> samples = model.generate("Hello.")
    """
    return PrewarmedChatterbox.from_pretrained_with_warmup(device, warmup, **arguments)
