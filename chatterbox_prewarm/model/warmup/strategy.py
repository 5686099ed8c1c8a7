"""The warm-up: three levels, each of which runs parts that the previous level leaves cold.

The methods import torch, so that a strategy can be created before a warm state is prepared.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, first_line
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio, reference_clip
from chatterbox_prewarm.model.warmup.settings import LEVELS, LONG_TEXT, SHORT_TEXT, TEXTS, check_levels, switched_off
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.fingerprint import device_kind
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.conditionals import Conditionals

logger = logging.getLogger(__name__)

#: Speech tokens of a warm-up synthesis. A few tokens run every kernel of a decode step and of S3Gen.
WARMUP_TOKENS = 8


class ChatterboxWarmupStrategy:
    """Runs a loaded Chatterbox model, so that everything created on first use is created now.

    It runs the code that the model will run: the regions if this project loaded the model, and otherwise upstream's own
    code. For a model that upstream's `from_pretrained` or `from_local` returned, it also lets T3 keep its backend
    between calls (see `t3_backend`).

    Level 1 runs each model once: voice encoder, T3, S3Gen. Level 2 runs the kernels that real use needs: a voice from a
    reference clip, complete syntheses of a short, a medium and a long text, the watermark. Level 3 first releases
    cached GPU memory, then grows the memory pools to the largest of the texts' shapes. A CPU has no such pools, so
    level 3 does nothing there.

    Example:
        >>> model = ChatterboxTTS.from_pretrained("cuda")
        >>> strategy = ChatterboxWarmupStrategy(device="cuda")
        >>> strategy.perform_full_warmup(model)
        >>> strategy.warmup_completed
        True

    Args:
        device: the device of the models to warm up, such as "cuda"; None accepts every model.
        levels: a selection of 1, 2 and 3; they run in ascending order.
        texts: the texts to synthesize at level 2, from short to long.
        max_new_tokens: speech tokens of each synthesis.
        progress: called with one line before each step.
        enabled: if False, or if the environment has CHATTERBOX_PREWARM_WARMUP=off, every method returns immediately.
        metrics: records phases; by default a new object.

    Attributes:
        warmup_completed: whether all levels ran.

    Raises:
        BadInputError: a level does not exist, or there is no such device.
        ModelError: the device is a GPU, and this machine has no GPU.
    """

    def __init__(  # noqa: PLR0913 - public API with optional keyword arguments
        self,
        device: str | None = None,
        *,
        levels: Sequence[int] = LEVELS,
        texts: Sequence[str] = TEXTS,
        max_new_tokens: int = WARMUP_TOKENS,
        progress: Callable[[str], None] = logger.info,
        enabled: bool = True,
        metrics: StartMetrics | None = None,
    ) -> None:
        self.device = None if device is None else check_device(device)
        self.levels = check_levels(levels)
        self.texts = tuple(texts)
        self.max_new_tokens = max_new_tokens
        self.enabled = enabled and not switched_off()
        self.metrics = metrics or StartMetrics()
        self.warmup_completed = False
        self._progress = progress

    def perform_full_warmup(self, model: ChatterboxTTS) -> StartMetrics:
        """Run all configured levels. The model's voice and the random generators keep their state.

        Returns:
            the metrics, with one phase such as "warm-up level 1" for each level that ran.

        Raises:
            BadInputError: the model is not on the device of this strategy.
        """
        if not self.enabled:
            self._progress("warm-up is switched off")
            return self.metrics
        self._check_model(model)
        from chatterbox_prewarm.model.synthesis import preserved_generators

        steps = {1: self.warm_up_models, 2: self.warm_up_cuda_kernels, 3: self.warm_up_memory_pools}
        try:
            with preserved_generators(str(model.device)):
                for level in self.levels:
                    with self.metrics.phase(f"warm-up level {level}"):
                        if not self._run_if_memory_suffices(steps[level], model):
                            logger.warning("level %d: out of memory; the warm-up stops before this level", level)
                            self.levels = tuple(done for done in self.levels if done < level)
                            break
                else:
                    self.warmup_completed = True
        finally:
            gc.collect()
        return self.metrics

    def _run_if_memory_suffices(self, step: Callable[[ChatterboxTTS], None], model: ChatterboxTTS) -> bool:
        """Run a level. If the device runs out of memory, free the memory and return False."""
        import torch

        try:
            step(model)
        except torch.OutOfMemoryError as error:
            self._progress(first_line(error))
        else:
            return True
        gc.collect()
        if str(model.device).startswith("cuda"):
            torch.cuda.empty_cache()
        return False

    def warm_up_models(self, model: ChatterboxTTS) -> None:
        """Run level 1: voice encoder, T3 and S3Gen once each, with a minimal input.

        Raises:
            BadInputError: the model is not on the device of this strategy.
        """
        if not self.enabled:
            return
        self._check_model(model)
        import torch

        from chatterbox_prewarm.model.synthesis import Synthesizer

        self._progress("level 1: voice encoder")
        with torch.inference_mode():
            model.ve.embeds_from_wavs([reference_audio(1.0, 16_000)], sample_rate=16_000)
            self._progress("level 1: S3Gen's reference embedding")
            model.s3gen.embed_ref(reference_audio(1.0), CLIP_SAMPLE_RATE, device=model.device)
        self._progress("level 1: T3 and S3Gen")
        if hasattr(model, "lean"):
            Synthesizer(model.lean, {DEFAULT_VOICE: _voice(model)}).check()
        else:
            _speak_with_upstream(model, SHORT_TEXT, _voice(model), self.max_new_tokens)

    def warm_up_cuda_kernels(self, model: ChatterboxTTS) -> None:
        """Run level 2: compute a voice from a clip, then synthesize each text with it, including the watermark.

        Raises:
            BadInputError: the model is not on the device of this strategy.
        """
        if not self.enabled:
            return
        self._check_model(model)
        from chatterbox_prewarm.model.voices import prepare_voice

        self._progress("level 2: a voice from a reference clip")
        with reference_clip() as clip:
            voice = prepare_voice(model, clip)
        for number, text in enumerate(self.texts, start=1):
            self._progress(f"level 2: synthesis {number} of {len(self.texts)}, {len(text)} characters")
            self._speak(model, text, voice, self.max_new_tokens)

    def warm_up_memory_pools(self, model: ChatterboxTTS) -> None:
        """Run level 3: grow the memory pools of a GPU to the shapes of the longest text.

        Raises:
            BadInputError: the model is not on the device of this strategy.
        """
        if not self.enabled:
            return
        self._check_model(model)
        if not str(model.device).startswith("cuda"):
            self._progress("level 3: nothing to do, because a CPU has no memory pools")
            return
        import torch

        self._progress("level 3: memory pools at the largest shape")
        torch.cuda.empty_cache()  # release the memory of the earlier levels; the memory allocated from now on stays
        self._speak(model, max(self.texts, key=len, default=LONG_TEXT), _voice(model), 4 * self.max_new_tokens)
        torch.cuda.synchronize(model.device)
        peak = torch.cuda.max_memory_allocated(model.device)
        self._progress(f"level 3: peak GPU memory {peak / 2**20:.0f} MiB")

    def _check_model(self, model: ChatterboxTTS) -> None:
        """Refuse an object that is not a model, or is on another device than the strategy's.

        Raises:
            BadInputError: see above.
        """
        if not all(hasattr(model, name) for name in ("t3", "s3gen", "ve", "tokenizer", "device")):
            raise BadInputError(
                f"{type(model).__name__} is not a Chatterbox model",
                next_step="pass what ChatterboxTTS.from_pretrained or from_pretrained_with_warmup returned",
            )
        if self.device is not None and device_kind(str(model.device)) != device_kind(self.device):
            raise BadInputError(
                f"the model is on {model.device}, and this strategy is for {self.device}",
                next_step=f"use ChatterboxWarmupStrategy(device={str(model.device)!r})",
            )

    def _speak(self, model: ChatterboxTTS, text: str, voice: Conditionals, max_new_tokens: int) -> None:
        """Speak a text with the code that the model will run."""
        from chatterbox_prewarm.model.synthesis import Synthesizer

        if hasattr(model, "lean"):
            synthesizer = Synthesizer(model.lean, {DEFAULT_VOICE: voice})
            synthesizer.synthesize(text, seed=0, max_new_tokens=max_new_tokens)
        else:
            _speak_with_upstream(model, text, voice, max_new_tokens)


def _speak_with_upstream(model: ChatterboxTTS, text: str, voice: Conditionals, max_new_tokens: int) -> None:
    """Run what upstream's `generate` runs. That method has no limit on the number of tokens."""
    import torch

    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.t3_backend import keep_backend
    from chatterbox_prewarm.model.upstream import variant_of
    from chatterbox_prewarm.model.variants import code_of, default_sampling
    from chatterbox_prewarm.model.voices import for_upstream

    keep_backend(model.t3)
    seed_everything(0)
    variant, conditionals = variant_of(model), for_upstream(voice)
    code = code_of(variant)
    text_ids = code.upstream_text_ids(model, text, variant.check_language(None))
    with torch.inference_mode():
        code.upstream_speech_tokens(
            model,
            conditionals.t3,
            text_ids,
            sampling=default_sampling(variant),
            max_new_tokens=max_new_tokens,
        )
        # Arbitrary tokens, because T3 may have stopped too early for any audio.
        tokens = torch.arange(max_new_tokens, device=model.device)
        samples, _ = model.s3gen.inference(speech_tokens=tokens[None], ref_dict=conditionals.gen)
        model.watermarker.apply_watermark(samples.squeeze(0).cpu().numpy(), sample_rate=model.sr)


def _voice(model: ChatterboxTTS) -> Conditionals:
    """Return a copy of the model's own voice, or the voice of a generated clip."""
    from chatterbox_prewarm.model.voices import detached, prepare_voice

    if model.conds is not None:
        return detached(model.conds)
    with reference_clip() as clip:
        return prepare_voice(model, clip)
