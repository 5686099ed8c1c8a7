"""The warm-up: three levels, each of which runs parts that the previous level leaves cold.

The methods import torch, so that a strategy can be created before a warm state is prepared.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.reference_clip import CLIP_SAMPLE_RATE, reference_audio, reference_clip
from chatterbox_prewarm.model.warmup.settings import LEVELS, TEXTS, check_levels, switched_off
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.synthesis import Synthesizer

logger = logging.getLogger(__name__)

#: Speech tokens of a warm-up synthesis. A few tokens run every kernel of a decode step and of S3Gen.
WARMUP_TOKENS = 8


class ChatterboxWarmupStrategy:
    """Runs a loaded Chatterbox model, so that everything created on first use is created now.

    Level 1 runs each model once: voice encoder, T3, S3Gen. Level 2 runs the kernels that real use needs: a voice from a
    reference clip, complete syntheses of a short, a medium and a long text, the watermark. Level 3 first releases
    cached GPU memory, then grows the memory pools to the largest of the texts' shapes.

    Args:
        levels: a selection of 1, 2 and 3; they run in ascending order.
        texts: the texts to synthesize at level 2, from short to long.
        max_new_tokens: speech tokens of each synthesis.
        progress: called with one line before each step.
        enabled: if False, or if the environment has CHATTERBOX_PREWARM_WARMUP=off, every method returns immediately.
        metrics: records phases; by default a new object.
        upstream: also run the code of the model's own `generate`. A `Synthesizer` does not need it.

    Raises:
        BadInputError: a level does not exist.
    """

    def __init__(  # noqa: PLR0913 - public API with optional keyword arguments
        self,
        *,
        levels: Sequence[int] = LEVELS,
        texts: Sequence[str] = TEXTS,
        max_new_tokens: int = WARMUP_TOKENS,
        progress: Callable[[str], None] = logger.info,
        enabled: bool = True,
        metrics: WarmupMetrics | None = None,
        upstream: bool = True,
    ) -> None:
        self.levels = check_levels(levels)
        self.texts = tuple(texts)
        self.max_new_tokens = max_new_tokens
        self.enabled = enabled and not switched_off()
        self.metrics = metrics or WarmupMetrics()
        self.upstream = upstream
        self._progress = progress

    def perform_full_warmup(self, model: ChatterboxTTS) -> WarmupMetrics:
        """Run all configured levels. The model's voice and the random generators keep their state.

        Returns:
            the metrics, with one phase such as "warm-up level 1" for each level that ran.
        """
        if not self.enabled:
            self._progress("warm-up is switched off")
            return self.metrics
        from chatterbox_prewarm.model.synthesis import preserved_generators

        steps = {1: self.warm_up_models, 2: self.warm_up_kernels, 3: self.warm_up_memory}
        try:
            with preserved_generators(str(model.device)):
                for level in self.levels:
                    with self.metrics.phase(f"warm-up level {level}"):
                        if not self._run_if_memory_suffices(steps[level], model):
                            self._progress(f"level {level}: out of memory; the warm-up stops before this level")
                            self.levels = tuple(done for done in self.levels if done < level)
                            break
        finally:
            gc.collect()
        return self.metrics

    def _run_if_memory_suffices(self, step: Callable[[ChatterboxTTS], None], model: ChatterboxTTS) -> bool:
        """Run a level. If the device runs out of memory, free the memory and return False."""
        import torch

        try:
            step(model)
        except torch.OutOfMemoryError as error:
            logger.warning("%s", str(error).partition("\n")[0])
        else:
            return True
        gc.collect()
        if str(model.device).startswith("cuda"):
            torch.cuda.empty_cache()
        return False

    def warm_up_models(self, model: ChatterboxTTS) -> None:
        """Run level 1: voice encoder, T3 and S3Gen once each, with a minimal input."""
        if not self.enabled:
            return
        import torch

        from chatterbox_prewarm.model.regions.pipeline import pipeline_of

        self._progress("level 1: voice encoder")
        with torch.inference_mode():
            model.ve.embeds_from_wavs([reference_audio(1.0, 16_000)], sample_rate=16_000)
            self._progress("level 1: S3Gen's reference embedding")
            reference = model.s3gen.embed_ref(reference_audio(1.0), CLIP_SAMPLE_RATE, device=model.device)
            self._progress("level 1: S3Gen")
            pipeline = pipeline_of(model)
            tokens = torch.arange(self.max_new_tokens, device=model.device)
            pipeline.vocoder(pipeline.flow(tokens, reference))
            if self.upstream:
                self._progress("level 1: upstream's own code")
                self._run_upstream(model, tokens, reference)
        self._progress("level 1: T3")
        self._synthesizer(model).speech_tokens(self.texts[0], max_new_tokens=self.max_new_tokens)

    def _run_upstream(self, model: ChatterboxTTS, tokens: torch.Tensor, reference: dict[str, Any]) -> None:
        """Run the code of `model.generate`, which a `Synthesizer` does not use."""
        import torch

        hyper = model.t3.hp
        text = model.tokenizer.text_to_tokens(self.texts[0]).to(model.device)
        text = torch.nn.functional.pad(torch.cat([text, text]), (1, 0), value=hyper.start_text_token)
        text = torch.nn.functional.pad(text, (0, 1), value=hyper.stop_text_token)
        voice = self._synthesizer(model).voices[DEFAULT_VOICE].t3
        model.t3.inference(t3_cond=voice, text_tokens=text, max_new_tokens=self.max_new_tokens)
        model.s3gen.inference(speech_tokens=tokens[None], ref_dict=dict(reference))

    def warm_up_kernels(self, model: ChatterboxTTS) -> None:
        """Run level 2: compute a voice from a clip, then synthesize each text with it, including the watermark."""
        if not self.enabled:
            return
        from chatterbox_prewarm.model.synthesis import Synthesizer
        from chatterbox_prewarm.model.voices import prepare_voice

        self._progress("level 2: a voice from a reference clip")
        with reference_clip() as clip:
            synthesizer = Synthesizer(model, {DEFAULT_VOICE: prepare_voice(model, clip)})
        for number, text in enumerate(self.texts, start=1):
            self._progress(f"level 2: synthesis {number} of {len(self.texts)}, {len(text)} characters")
            synthesizer.synthesize(text, seed=0, max_new_tokens=self.max_new_tokens)

    def warm_up_memory(self, model: ChatterboxTTS) -> None:
        """Run level 3: grow the memory pools to the shapes of the longest text."""
        if not self.enabled:
            return
        import torch

        self._progress("level 3: memory pools at the largest shape")
        on_gpu = str(model.device).startswith("cuda")
        if on_gpu:
            torch.cuda.empty_cache()  # release the memory of the earlier levels; the memory allocated from now on stays
        self._synthesizer(model).synthesize(max(self.texts, key=len), seed=0, max_new_tokens=4 * self.max_new_tokens)
        if on_gpu:
            torch.cuda.synchronize(model.device)
            peak = torch.cuda.max_memory_allocated(model.device)
            self._progress(f"level 3: peak GPU memory {peak / 2**20:.0f} MiB")

    def _synthesizer(self, model: ChatterboxTTS) -> Synthesizer:
        """Return a synthesizer with the model's own voice, or with a voice of a generated clip."""
        from chatterbox_prewarm.model.synthesis import Synthesizer
        from chatterbox_prewarm.model.voices import detached, prepare_voice

        if model.conds is not None:
            return Synthesizer(model, {DEFAULT_VOICE: detached(model.conds)})
        with reference_clip() as clip:
            return Synthesizer(model, {DEFAULT_VOICE: prepare_voice(model, clip)})
