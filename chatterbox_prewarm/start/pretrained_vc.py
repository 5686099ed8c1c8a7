"""Upstream's `ChatterboxVC`, loaded warm: it speaks recorded speech with another voice."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, first_line, is_out_of_memory, is_out_of_threads
from chatterbox_prewarm.model.clips import DEFAULT_VOICE, SOURCE, decoded_clip, existing_file, read_clip
from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio
from chatterbox_prewarm.model.streaming import CHUNK_TOKENS, check_chunks
from chatterbox_prewarm.model.warmup.settings import switched_off
from chatterbox_prewarm.start.attach import Attached, start
from chatterbox_prewarm.start.defaults import default_options
from chatterbox_prewarm.start.upstream import attach_upstream
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.system.metrics import StartMetrics

#: The speech of the warm-up, in seconds.
_WARMUP_SECONDS = 1.0
_CLIP_STEP = "give the path of an audio file with 5 to 10 s of clean speech"


class PrewarmedVC:
    """Upstream's `ChatterboxVC` with its methods, loaded with a warm state and warmed up.

    It is not a subclass of upstream's class, because a conversion works without upstream's packages. They are imported
    by the first `set_target_voice`, and by a start that finds no built-in voice. Only one call may run at a time, as in
    upstream's class.

    Example:
        >>> model = PrewarmedVC.from_pretrained_with_warmup("cuda")
        >>> samples = model.generate("speech.wav", target_voice_path="voice.wav")
        >>> torchaudio.save("converted.wav", samples, model.sr)

    Args:
        attached: a start with `converts`.

    Attributes:
        attached: the start of this model: its warm state, its misses, and the baked voices.
        sr: the sample rate of the audio in Hz.
        device: of the model.
        ref_dict: the target voice, as in upstream's class: tensors by their names. Its tensors may be on the CPU.
        warmup_completed: whether the warm-up ran.
    """

    def __init__(self, attached: Attached) -> None:
        from chatterbox_prewarm.model.conversion import load_converter

        model = attached.synthesizer.model
        self.attached = attached
        self.sr, self.device = model.sample_rate, model.device
        self.ref_dict: dict[str, Any] | None = {
            "prompt_feat_len": None,
            **attached.synthesizer.voices[DEFAULT_VOICE].gen,
        }
        self.warmup_completed = False
        self._converter = load_converter(model, attached.prepared.options.weights)
        self._upstream: Any = None

    @classmethod
    def from_pretrained_with_warmup(
        cls,
        device: str = "cpu",
        warmup: bool = True,
        *,
        weights: str | Path | None = None,
        warm: str | Path | None = None,
        cache: str | Path | None = None,
        policy: str = "fallback",
    ) -> PrewarmedVC:
        """Load the model with its warm state, and warm it up with a conversion of a second of generated speech.

        It uses the checkpoint and the state of a model that speaks texts. T3 is not loaded.

        Args:
            device: as upstream takes it, a string such as "cpu" or "cuda".
            warmup: whether to warm up now.
            weights: the directory of a checkpoint; by default as `PrewarmedChatterbox.from_pretrained_with_warmup`.
            warm: a warm state, or a folder of several. By default the path in an image; elsewhere the model starts
                cold.
            cache: a writable directory for compilers and Numba; by default below the user's cache directory.
            policy: what to do with a warm state that does not fit; see `StartOptions`.

        Returns:
            the model, with the built-in voice as its target.

        Raises:
            PrewarmError: as `default_options` and `load_warmup_cache`.
        """
        options = default_options(
            DEFAULT_VARIANT, device, weights=weights, warm=warm, cache=cache, policy=policy, converts=True
        )
        model = cls(start(options))
        if warmup and not switched_off():
            model._warm_up()
        return model

    @classmethod
    def from_pretrained(cls, device: str) -> PrewarmedVC:
        """Load and warm up the published model, as `from_pretrained_with_warmup`."""
        return cls.from_pretrained_with_warmup(device)

    @classmethod
    def from_local(cls, ckpt_dir: str | Path, device: str) -> PrewarmedVC:
        """Load and warm up a checkpoint, as `from_pretrained_with_warmup`."""
        return cls.from_pretrained_with_warmup(device, weights=ckpt_dir)

    @property
    def metrics(self) -> StartMetrics:
        """The event log and counters of this start."""
        return self.attached.metrics

    def set_target_voice(self, wav_fpath: str | Path) -> None:
        """Compute the voice of a reference clip, and use it from now on. The first call loads upstream's model.

        Args:
            wav_fpath: a clip of 1 to 300 s, of which upstream uses the first 10 s: at least 16 kHz, at most two
                channels, in a format that libsndfile reads.

        Raises:
            BadInputError: there is no such file, or it is not such a clip.
            ModelError: upstream's packages are not installed.
        """
        import torch

        path = existing_file(wav_fpath, what=f"the clip {wav_fpath!s}", next_step=_CLIP_STEP)
        with decoded_clip(path, what=f"the clip {path}", channels=2) as decoded:
            upstream = self._load_upstream()
            try:
                with torch.inference_mode():
                    upstream.set_target_voice(decoded)
            except (RuntimeError, ValueError) as error:
                if is_out_of_memory(error) or is_out_of_threads(error):
                    raise  # another clip would not help
                raise BadInputError(
                    f"no voice could be made from {path}: {first_line(error)}",
                    next_step=_CLIP_STEP,
                ) from error
        self.ref_dict = {
            name: value.clone() if torch.is_tensor(value) else value for name, value in upstream.ref_dict.items()
        }

    def generate(self, audio: str | Path, target_voice_path: str | Path | None = None) -> torch.Tensor:
        """Speak recorded speech with the target voice, with the arguments of upstream's `generate`.

        The random numbers come from the global generators, so `torch.manual_seed` makes the result repeatable. The
        audio equals upstream's except for rounding. Speech of more than 40 s is spoken in parts, so its audio differs.

        Args:
            audio: a file with 0.12 to 300 s of speech that is not silent: at least 8 kHz, at most two channels, in a
                format that libsndfile reads.
            target_voice_path: a reference clip; its voice stays set for later calls. By default the present voice.

        Returns:
            float32 (1, n), watermarked mono audio at `sr` Hz.

        Raises:
            BadInputError: the file is not such speech, there is no target voice, or see `set_target_voice`.
        """
        import torch

        samples, rate = _read(audio)
        speech = self._converter.speak(samples, rate, self._voice(target_voice_path))
        return torch.from_numpy(speech.samples).unsqueeze(0)

    def generate_stream(
        self,
        audio: str | Path,
        target_voice_path: str | Path | None = None,
        *,
        seed: int | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        look_ahead: int | None = None,
    ) -> Generator[Chunk]:
        """Speak recorded speech with the target voice, in chunks.

        Args:
            audio: see `generate`.
            target_voice_path: see `generate`.
            seed: makes the result reproducible on the same machine; None chooses a random seed.
            chunk_tokens: see the function `generate_stream`.
            look_ahead: see the function `generate_stream`.

        Raises:
            BadInputError: at the call, an argument cannot be used.
        """
        from chatterbox_prewarm.model.synthesis import chosen_seed

        check_chunks(chunk_tokens, look_ahead)  # before the target voice changes
        seed = chosen_seed(seed)
        samples, rate = _read(audio)
        voice = self._voice(target_voice_path)
        return self._converter.stream(samples, rate, voice, seed=seed, chunk_tokens=chunk_tokens, look_ahead=look_ahead)

    def _voice(self, target_voice_path: str | Path | None) -> Conditionals:
        """Set the target voice if there is a path, and return the target voice.

        Raises:
            BadInputError: there is no target voice, or see `set_target_voice`.
        """
        if target_voice_path:
            self.set_target_voice(target_voice_path)
        if self.ref_dict is None:
            raise BadInputError(
                "the model has no target voice", next_step="call set_target_voice, or give target_voice_path"
            )
        gen = {name: value for name, value in self.ref_dict.items() if value is not None}
        return replace(self.attached.synthesizer.voices[DEFAULT_VOICE], gen=gen)

    def _load_upstream(self) -> Any:
        """Return upstream's `ChatterboxVC` on the CPU, without a watermarker."""
        if self._upstream is None:
            from chatterbox_prewarm.model.synthesis import preserved_generators

            with preserved_generators(self.device):  # constructing a model draws random numbers
                s3gen = attach_upstream(self.attached.prepared).s3gen
            from chatterbox.vc import ChatterboxVC

            self._upstream = ChatterboxVC.__new__(ChatterboxVC)  # `__init__` would load a watermarker
            self._upstream.s3gen, self._upstream.device = s3gen, "cpu"
        return self._upstream

    def _warm_up(self) -> None:
        from chatterbox_prewarm.model.synthesis import preserved_generators

        with self.metrics.phase("first conversion"), preserved_generators(self.device):
            self._converter.convert(reference_audio(_WARMUP_SECONDS), CLIP_SAMPLE_RATE, self._voice(None), seed=0)
        self.metrics.mark("ready")
        self.warmup_completed = True


def _read(audio: str | Path) -> tuple[NDArray[np.float32], int]:
    """Read speech: float32 (n,) mono, and its sample rate in Hz."""
    path = existing_file(audio, what=f"the speech {audio!s}", next_step="give the path of an audio file")
    return read_clip(path, what=f"the speech {path}", channels=2, kind=SOURCE)
