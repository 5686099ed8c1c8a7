"""One fresh process that speaks a text, so that the audio of two systems can be compared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.speak_process import UPSTREAM, WARM
from chatterbox_prewarm.bench.upstream import limit_tokens, load
from chatterbox_prewarm.model.warmup.settings import MEDIUM_TEXT
from chatterbox_prewarm.system.json_subprocess import report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SEED = 1


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """Options of the process. They are passed to it as JSON.

    Attributes:
        system: "upstream", "cold" or "warm", as in `SpeakOptions`.
        weights: directory of the checkpoint.
        warm: directory of the warm state of a warm start.
        device: torch device.
        text: text to speak.
        max_new_tokens: maximum number of speech tokens.
        audio: the WAV file to write. The numbers go into a file of the same name with the ending .npz.
        reference: file with upstream's result for the comparison of the stages. Upstream writes it.
    """

    system: str
    weights: str
    warm: str | None = None
    device: str = "cpu"
    text: str = MEDIUM_TEXT
    max_new_tokens: int
    audio: str
    reference: str


def run(*, cache: str, **fields: Any) -> dict[str, Any]:
    """Speak the text with fixed random numbers, and compare each stage with upstream.

    Args:
        cache: an empty cache directory.
        **fields: the fields of `QualityOptions`.

    Returns:
        `watermark`: confidence from 0 to 1 with which upstream's detector finds the watermark; `seconds` of audio; for
        our code also the results of `fidelity.compare`.
    """
    options = QualityOptions(**fields)
    return _upstream(options) if options.system == UPSTREAM else _ours(options, cache)


def _upstream(options: QualityOptions) -> dict[str, Any]:
    model = load(options.weights, options.device)

    import torch

    from chatterbox_prewarm.bench.fidelity import reference
    from chatterbox_prewarm.model.synthesis import seed_everything
    from chatterbox_prewarm.model.voices import detached

    torch.save(reference(model, detached(model.conds), options.text), options.reference)
    limit_tokens(model, options.max_new_tokens)
    seed_everything(_SEED)
    return _save(options, model.sr, model.generate(options.text)[0].numpy(), None)


def _ours(options: QualityOptions, cache: str) -> dict[str, Any]:
    from chatterbox_prewarm.start.attach import load_warmup_cache

    warm = options.system == WARM
    attached = load_warmup_cache(
        options.warm if warm and options.warm else os.devnull,
        options.weights,
        cache=cache,
        device=options.device,
        policy="require" if warm else "off",
    )

    import torch

    from chatterbox_prewarm.bench.fidelity import compare

    synthesizer = attached.synthesizer
    speech = synthesizer.synthesize(options.text, seed=_SEED, max_new_tokens=options.max_new_tokens)
    result = _save(options, speech.sample_rate, speech.samples, speech.tokens)
    return result | compare(synthesizer, options.text, torch.load(options.reference, weights_only=True))


def _save(
    options: QualityOptions, sample_rate: int, samples: NDArray[np.float32], tokens: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Write the audio, its tokens and its mel spectrogram (natural logarithm, as S3Gen uses it)."""
    import numpy as np
    import soundfile
    import torch

    from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox

    import_chatterbox()
    from chatterbox.models.s3gen.utils.mel import mel_spectrogram
    from perth import PerthImplicitWatermarker

    mel = mel_spectrogram(torch.from_numpy(samples)[None])[0].numpy()
    np.savez(
        Path(options.audio).with_suffix(".npz"),
        tokens=np.zeros(0, np.int64) if tokens is None else tokens,
        samples=samples,
        mel=mel,
    )
    soundfile.write(options.audio, samples, sample_rate, subtype="PCM_16")
    confidence = PerthImplicitWatermarker().get_watermark(samples, sample_rate=sample_rate, round=False)
    return {"watermark": float(np.mean(confidence)), "seconds": len(samples) / sample_rate}


if __name__ == "__main__":
    report(run)
