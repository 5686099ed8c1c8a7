"""Compare the tokens, the mel spectrogram and the audio of a profile with those of upstream for the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions.t3_blocks import START_SPEECH_TOKEN
from chatterbox_prewarm.model.synthesis import seed_everything
from chatterbox_prewarm.model.upstream import variant_of
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.model.voices import for_upstream

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.synthesis import Synthesizer

#: Number of speech tokens that are decoded greedily (eight seconds). The first `_RENDERED` of them become audio.
TOKENS = 200
_RENDERED = 50
_SEED = 1
#: Compute convolutions in full float32. By default, cuDNN rounds them to TF32 on a GPU. The rounding error is larger
#: than the differences that are measured here.
_full_precision = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


@_full_precision
@torch.inference_mode()
def reference(model: ChatterboxTTS, voice: Conditionals, text: str) -> dict[str, torch.Tensor]:
    """Synthesize a text with upstream's code.

    Returns:
        tensors on the CPU: `tokens`, int64 (at most 200,); `mel` of the first 50 tokens, float32 (1, 80, frames);
        `sound` of that mel, float32 (samples,).
    """
    conditionals = for_upstream(voice)
    variant = variant_of(model)
    code, language = code_of(variant), variant.check_language(None)
    tokens = code.upstream_speech_tokens(
        model,
        conditionals.t3,
        code.upstream_text_ids(model, text, language),
        sampling=code.GREEDY,
        max_new_tokens=TOKENS,
    )
    seed_everything(_SEED)
    mel = model.s3gen.flow_inference(_tokens_to_render(tokens), ref_dict=conditionals.gen, finalize=True)
    seed_everything(_SEED)
    sound = model.s3gen.hift_inference(mel)[0][0].clone()
    fade = model.s3gen.trim_fade
    sound[: len(fade)] *= fade
    return {"tokens": tokens.cpu(), "mel": mel.cpu(), "sound": sound.cpu()}


@_full_precision
@torch.inference_mode()
def compare(synthesizer: Synthesizer, text: str, upstreams: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compare the regions of a model with upstream. Each stage gets upstream's result of the stage before.

    Args:
        synthesizer: synthesizer with the regions.
        text: text of the reference.
        upstreams: result of `reference`.

    Returns:
        greedy_tokens_equal: number of greedily decoded tokens that equal upstream's, up to the first difference.
        next_tokens_equal: share of upstream's tokens after which the most likely token equals upstream's next one.
        mel_difference: largest difference, relative to the largest value.
        sound_decibels: ratio of the energy of the audio to the energy of the difference, in dB.
    """
    model, voice = synthesizer.model, synthesizer.voices[DEFAULT_VOICE]
    expected = upstreams["tokens"].to(model.device)
    prompt, greedy = model.text_tokens(text), code_of(model.variant).GREEDY
    decoded = model.decoder(voice.t3, prompt, sampling=greedy, max_new_tokens=len(expected))
    length = min(len(decoded), len(expected))
    differs = (decoded[:length] != expected[:length]).nonzero()
    hidden = model.decoder.hidden(voice.t3, prompt, expected, sampling=greedy)
    likeliest = model.decoder.likeliest(hidden, expected, sampling=greedy)
    seed_everything(_SEED)
    mel = model.flow(_tokens_to_render(expected), voice.gen)
    expected_mel = upstreams["mel"].to(model.device)
    seed_everything(_SEED)
    sound = model.vocoder(expected_mel).cpu()
    error = (sound - upstreams["sound"]).square().sum().clamp(min=1e-30)
    return {
        "greedy_tokens_equal": float(differs[0, 0]) if differs.numel() else float(length),
        "next_tokens_equal": float((likeliest == expected).float().mean()),
        "mel_difference": float((mel - expected_mel).abs().max() / expected_mel.abs().max()),
        "sound_decibels": float(10 * torch.log10(upstreams["sound"].square().sum() / error)),
    }


def _tokens_to_render(tokens: torch.Tensor) -> torch.Tensor:
    """Return the first tokens that are in the codebook; random weights also sample tokens outside it."""
    kept: torch.Tensor = tokens[tokens < START_SPEECH_TOKEN][:_RENDERED]
    return kept
