"""Upstream's `ChatterboxVC`, loaded warm: it speaks recorded speech with another voice."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, first_line
from chatterbox_prewarm.model.clips import DEFAULT_VOICE, SOURCE, decoded_clip, read_clip
from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio
from chatterbox_prewarm.model.warmup.settings import switched_off
from chatterbox_prewarm.start.attach import Attached, load_warmup_cache
from chatterbox_prewarm.start.defaults import default_cache, default_weights
from chatterbox_prewarm.start.upstream import attach_upstream
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.paths import WARM

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

    from chatterbox_prewarm.model.chunk import Chunk
    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.system.metrics import StartMetrics

#: The speech of the warm-up, in seconds.
_WARMUP_SECONDS = 1.0


class PrewarmedVC:
    """Upstream's `ChatterboxVC` with its methods, loaded with a warm state and warmed up.

    It is not a subclass of upstream's class, because a conversion needs none of upstream's packages. Only
    `set_target_voice` imports them. Only one call may run at a time, as in upstream's class.

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
        ref_dict: tensors of the target voice by their names, as in upstream's class.
        warmup_completed: whether the warm-up ran.
    """

    def __init__(self, attached: Attached) -> None:
        from chatterbox_prewarm.model.conversion import load_converter

        model = attached.synthesizer.model
        self.attached = attached
        self.sr, self.device = model.sample_rate, model.device
        self.ref_dict = dict(attached.synthesizer.voices[DEFAULT_VOICE].gen)
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

        The checkpoint and the state are those of a model that speaks texts. T3 is not loaded.

        Args:
            device: as upstream takes it, a string such as "cpu" or "cuda".
            warmup: whether to warm up now.
            weights: see `PrewarmedChatterbox.from_pretrained_with_warmup`.
            warm: see there.
            cache: see there.
            policy: see there.

        Returns:
            the model, with the built-in voice as its target.

        Raises:
            PrewarmError: as `check_device`, `default_weights` and `load_warmup_cache`.
        """
        device = check_device(device)
        if warm is None and WARM.is_dir():
            warm = WARM
        attached = load_warmup_cache(
            warm or os.devnull,
            weights or default_weights(),
            cache=cache or default_cache(),
            device=device,
            policy=policy if warm is not None else "off",
            converts=True,
        )
        model = cls(attached)
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
            wav_fpath: a clip, of which upstream uses the first 10 s.

        Raises:
            BadInputError: there is no such file, or it is not audio from which a voice can be made.
            ModelError: upstream's packages are not installed.
        """
        import torch

        from chatterbox_prewarm.model.synthesis import preserved_generators

        what = f"the clip {wav_fpath}"
        with torch.inference_mode(), decoded_clip(Path(wav_fpath), what=what, channels=2) as path:
            if self._upstream is None:
                with preserved_generators(self.device):  # loading draws random numbers
                    s3gen = attach_upstream(self.attached.prepared).s3gen
                from chatterbox.vc import ChatterboxVC

                # Without `__init__`, which loads a watermarker. On the CPU, because S3Gen's tensors are there.
                self._upstream = ChatterboxVC.__new__(ChatterboxVC)
                self._upstream.s3gen, self._upstream.device = s3gen, "cpu"
            try:
                self._upstream.set_target_voice(path)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                raise BadInputError(
                    f"no voice could be made from {wav_fpath}: {first_line(error)}",
                    next_step="give the path of an audio file with 5 to 10 s of clean speech",
                ) from error
        found = self._upstream.ref_dict
        self.ref_dict = {name: value.clone() for name, value in found.items() if torch.is_tensor(value)}

    def generate(self, audio: str | Path, target_voice_path: str | Path | None = None) -> torch.Tensor:
        """Speak recorded speech with the target voice, with the arguments and the result of upstream's `generate`.

        The random numbers come from the global generators: `torch.manual_seed` makes the result repeatable.

        Args:
            audio: a file with 0.12 to 300 s of speech, in a format that libsndfile reads.
            target_voice_path: a reference clip; its voice stays set for later calls. By default the present voice.

        Returns:
            float32 (1, n), watermarked mono audio at `sr` Hz.

        Raises:
            BadInputError: the file is not such speech, or see `set_target_voice`.
        """
        import torch

        samples, rate = self._read(audio, target_voice_path)
        speech = self._converter.speak(samples, rate, self._voice)
        return torch.from_numpy(speech.samples).unsqueeze(0)

    def generate_stream(
        self, audio: str | Path, target_voice_path: str | Path | None = None, **arguments: Any
    ) -> Generator[Chunk]:
        """Speak recorded speech with the target voice, in chunks.

        Args:
            audio: see `generate`.
            target_voice_path: see `generate`.
            **arguments: `seed`, `chunk_tokens` and `look_ahead`, as for the function `generate_stream`.

        Raises:
            BadInputError: at the call, an argument cannot be used.
        """
        samples, rate = self._read(audio, target_voice_path)
        return self._converter.stream(samples, rate, self._voice, **arguments)

    @property
    def _voice(self) -> Conditionals:
        return replace(self.attached.synthesizer.voices[DEFAULT_VOICE], gen=self.ref_dict)

    def _read(self, audio: str | Path, target_voice_path: str | Path | None) -> tuple[Any, int]:
        """Set the target voice, and read the speech: float32 (n,) mono, and its sample rate in Hz."""
        if target_voice_path:
            self.set_target_voice(target_voice_path)
        return read_clip(Path(audio), what=f"the speech {audio}", channels=2, kind=SOURCE)

    def _warm_up(self) -> None:
        from chatterbox_prewarm.model.synthesis import preserved_generators

        with self.metrics.phase("first conversion"), preserved_generators(self.device):
            self._converter.convert(reference_audio(_WARMUP_SECONDS), CLIP_SAMPLE_RATE, self._voice, seed=0)
        self.metrics.mark("ready")
        self.warmup_completed = True
