"""Compare the tokens, the mel spectrogram and the audio of a profile with those of upstream for the same inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions.t3_blocks import START_SPEECH_TOKEN, rms_norm
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.synthesis import seed_everything
from chatterbox_prewarm.model.upstream import upstream_text_tokens
from chatterbox_prewarm.model.voices import for_upstream

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.model.synthesis import Synthesizer

#: Number of speech tokens that are decoded greedily (eight seconds), and number of those that are rendered as audio.
TOKENS = 200
_RENDERED = 50
_GREEDY = Sampling(min_p=1.0)
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
    tokens = model.t3.inference(
        t3_cond=conditionals.t3,
        text_tokens=upstream_text_tokens(model, text),
        max_new_tokens=TOKENS,
        temperature=_GREEDY.temperature,
        cfg_weight=_GREEDY.cfg_weight,
        repetition_penalty=_GREEDY.repetition_penalty,
        min_p=_GREEDY.min_p,
        top_p=_GREEDY.top_p,
    )[0]
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
    prompt = model.text_tokens(text)
    decoded = model.decoder(voice.t3, prompt, sampling=_GREEDY, max_new_tokens=len(expected))
    length = min(len(decoded), len(expected))
    differs = (decoded[:length] != expected[:length]).nonzero()
    hidden = model.decoder.hidden(voice.t3, prompt, expected, sampling=_GREEDY)
    seed_everything(_SEED)
    mel = model.flow(_tokens_to_render(expected), voice.gen)
    expected_mel = upstreams["mel"].to(model.device)
    seed_everything(_SEED)
    sound = model.vocoder(expected_mel).cpu()
    error = (sound - upstreams["sound"]).square().sum().clamp(min=1e-30)
    return {
        "greedy_tokens_equal": float(differs[0, 0]) if differs.numel() else float(length),
        "next_tokens_equal": float((_likeliest(model, hidden, expected) == expected).float().mean()),
        "mel_difference": float((mel - expected_mel).abs().max() / expected_mel.abs().max()),
        "sound_decibels": float(10 * torch.log10(upstreams["sound"].square().sum() / error)),
    }


def _tokens_to_render(tokens: torch.Tensor) -> torch.Tensor:
    """Return the first tokens that are in the codebook; random weights also sample tokens outside it."""
    kept: torch.Tensor = tokens[tokens < START_SPEECH_TOKEN][:_RENDERED]
    return kept


def _likeliest(model: Model, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the most likely token at the position of each of `tokens`, given the tokens before it; int64 (n,).

    Args:
        model: the model.
        hidden: hidden states at these positions, (n, 2, 1024).
        tokens: int64 (n,).
    """
    norm, head = (model.tensors[f"t3.{name}.weight"].to(hidden.dtype) for name in ("tfmr.norm", "speech_head"))
    logits = functional.linear(rms_norm(hidden, norm), head).float()
    guided = logits[:, 0] + _GREEDY.cfg_weight * (logits[:, 0] - logits[:, 1])
    before = torch.cat([tokens.new_tensor([START_SPEECH_TOKEN]), tokens[:-1]])
    # Row i marks the tokens that occur in the sequence before position i.
    used = functional.one_hot(before, guided.size(1)).cumsum(0) > 0
    penalty = _GREEDY.repetition_penalty
    penalized = torch.where(guided < 0, guided * penalty, guided / penalty)
    return torch.where(used, penalized, guided).argmax(dim=1)
