"""The warm-up itself: three levels, each exercising what the one before left cold.

torch is imported in the methods: a strategy can be made before a warm state is prepared.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.warmup.inputs import CLIP_SAMPLE_RATE, TEXTS, reference_audio, reference_clip
from chatterbox_prewarm.model.warmup.levels import LEVELS, check_levels, switched_off
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.synthesis import Synthesizer

logger = logging.getLogger(__name__)

#: Speech tokens of a warm-up synthesis: every kernel of a decode step and of S3Gen runs, and no time is wasted.
WARMUP_TOKENS = 8


class ChatterboxWarmupStrategy:
    """Exercises a loaded Chatterbox model, so that whatever is made on first use is made now.

    Level 1 runs each model once: voice encoder, T3, S3Gen. Level 2 runs the kernels that real use needs: a voice
    from a reference clip, whole syntheses of a short, a medium and a long text, the watermark. Level 3 touches
    memory pools at the largest of the texts' shapes, after giving back what the levels before held in passing.

    Args:
        levels: which of 1, 2 and 3 to run; they run in ascending order.
        texts: what to synthesise at level 2, short to long.
        max_new_tokens: speech tokens of each synthesis.
        progress: called with one line before each step.
        enabled: False, or CHATTERBOX_PREWARM_WARMUP=off in the environment, makes every method return at once.
        metrics: where phases are recorded; a new log by default.
        upstream: also run what the model's own `generate` runs; a `Synthesizer` does not need it.

    Raises:
        BadInputError: a level that does not exist.
    """

    def __init__(
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
        """Run all configured levels; the model's voice and the random generators are left as they were.

        Returns:
            the log, with the phases "warm-up level 1" to "warm-up level 3" as far as they ran.
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
                        if not self._fits(steps[level], model):
                            self._progress(f"level {level}: out of memory; the warm-up ends below it")
                            self.levels = tuple(done for done in self.levels if done < level)
                            break
        finally:
            gc.collect()
        return self.metrics

    def _fits(self, step: Callable[[ChatterboxTTS], None], model: ChatterboxTTS) -> bool:
        """Run a level; False when the device has too little memory for it, which is then given back."""
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
        """Level 1: run voice encoder, T3 and S3Gen once each, on the least input."""
        if not self.enabled:
            return
        import torch

        from chatterbox_prewarm.model.regions.pipeline import bound

        self._progress("level 1: voice encoder")
        with torch.inference_mode():
            model.ve.embeds_from_wavs([reference_audio(1.0, 16_000)], sample_rate=16_000)
            self._progress("level 1: S3Gen's reference embedding")
            reference = model.s3gen.embed_ref(reference_audio(1.0), CLIP_SAMPLE_RATE, device=model.device)
            self._progress("level 1: S3Gen")
            stages = bound(model)
            tokens = torch.arange(self.max_new_tokens, device=model.device)
            stages.vocoder(stages.flow(tokens, reference))
            if self.upstream:
                self._progress("level 1: upstream's own code")
                self._run_upstream(model, tokens, reference)
        self._progress("level 1: T3")
        self._synthesizer(model).speech_tokens(self.texts[0], max_new_tokens=self.max_new_tokens)

    def _run_upstream(self, model: ChatterboxTTS, tokens: torch.Tensor, reference: dict[str, Any]) -> None:
        """What `model.generate` runs, which is not what a `Synthesizer` does."""
        import torch

        hyper = model.t3.hp
        text = model.tokenizer.text_to_tokens(self.texts[0]).to(model.device)
        text = torch.nn.functional.pad(torch.cat([text, text]), (1, 0), value=hyper.start_text_token)
        text = torch.nn.functional.pad(text, (0, 1), value=hyper.stop_text_token)
        voice = self._synthesizer(model).voices[DEFAULT_VOICE].t3
        model.t3.inference(t3_cond=voice, text_tokens=text, max_new_tokens=self.max_new_tokens)
        model.s3gen.inference(speech_tokens=tokens[None], ref_dict=dict(reference))

    def warm_up_kernels(self, model: ChatterboxTTS) -> None:
        """Level 2: make a voice from a clip, then synthesise each text with it, watermark included."""
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
        """Level 3: grow memory pools to the longest text's shapes, and settle them."""
        if not self.enabled:
            return
        import torch

        self._progress("level 3: memory pools at the largest shape")
        on_gpu = str(model.device).startswith("cuda")
        if on_gpu:
            torch.cuda.empty_cache()  # what the levels before held in passing; what comes now stays
        self._synthesizer(model).synthesize(max(self.texts, key=len), seed=0, max_new_tokens=4 * self.max_new_tokens)
        if on_gpu:
            torch.cuda.synchronize(model.device)
            peak = torch.cuda.max_memory_allocated(model.device)
            self._progress(f"level 3: {peak / 2**20:.0f} MiB of GPU memory at the peak")

    def _synthesizer(self, model: ChatterboxTTS) -> Synthesizer:
        """A synthesizer with the model's own voice, or with one of a generated clip."""
        from chatterbox_prewarm.model.synthesis import Synthesizer
        from chatterbox_prewarm.model.voices import detached, prepare_voice

        if model.conds is not None:
            return Synthesizer(model, {DEFAULT_VOICE: detached(model.conds)})
        with reference_clip() as clip:
            return Synthesizer(model, {DEFAULT_VOICE: prepare_voice(model, clip)})
