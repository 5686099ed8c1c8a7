"""How near a profile is to upstream: the same tokens, spectrogram and sound from the same inputs, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions.pipeline import bound
from chatterbox_prewarm.model.regions.t3_blocks import rms_norm
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.synthesis import seed_everything
from chatterbox_prewarm.model.voices import detached

if TYPE_CHECKING:
    from chatterbox.tts import ChatterboxTTS, Conditionals

    from chatterbox_prewarm.model.synthesis import Synthesizer

#: Speech tokens drawn greedily, eight seconds, and how many of them are made to sound.
TOKENS = 200
_SOUNDING = 50
_GREEDY = Sampling(min_p=1.0)
_SEED = 1
#: Convolutions in full float32: on a GPU torch has cuDNN round them to TF32, upstream's and ours alike, by more than
#: what is to be seen here.
_exactly = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def text_tokens(model: ChatterboxTTS, text: str) -> torch.Tensor:
    """The tokens of a text as T3 takes them, int64 (1, n), start and stop tokens included."""
    from chatterbox.tts import punc_norm

    tokens = model.tokenizer.text_to_tokens(punc_norm(text)).to(model.device)
    tokens = functional.pad(tokens, (1, 0), value=model.t3.hp.start_text_token)
    padded: torch.Tensor = functional.pad(tokens, (0, 1), value=model.t3.hp.stop_text_token)
    return padded


@_exactly
@torch.inference_mode()
def reference(model: ChatterboxTTS, voice: Conditionals, text: str) -> dict[str, torch.Tensor]:
    """What upstream makes of a text.

    Returns:
        on the CPU: `tokens`, int64 (200,) at most; `mel`, float32 (1, 80, frames), of the first of them; `sound`,
        float32 (samples,), of `mel`.
    """
    tokens = model.t3.inference(
        t3_cond=detached(voice).t3,
        text_tokens=text_tokens(model, text).repeat(2, 1),
        max_new_tokens=TOKENS,
        temperature=_GREEDY.temperature,
        cfg_weight=_GREEDY.cfg_weight,
        repetition_penalty=_GREEDY.repetition_penalty,
        min_p=_GREEDY.min_p,
        top_p=_GREEDY.top_p,
    )[0]
    seed_everything(_SEED)
    mel = model.s3gen.flow_inference(_sounding(model, tokens), ref_dict=dict(voice.gen), finalize=True)
    seed_everything(_SEED)
    sound = model.s3gen.hift_inference(mel)[0][0].clone()
    fade = model.s3gen.trim_fade
    sound[: len(fade)] *= fade
    return {"tokens": tokens.cpu(), "mel": mel.cpu(), "sound": sound.cpu()}


@_exactly
@torch.inference_mode()
def compare(synthesizer: Synthesizer, text: str, upstreams: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the regions bound to a model are from upstream, each stage given what upstream's gave before.

    Args:
        synthesizer: with the regions to look at.
        text: of the reference.
        upstreams: what `reference` returned.

    Returns:
        greedy_tokens_equal: how many tokens, drawn freely, are upstream's, up to the first that is not.
        next_tokens_equal: for which share of upstream's tokens the next one would be upstream's too.
        mel_difference: the largest, relative to the largest value.
        sound_decibels: the energy of the signal over that of the difference.
    """
    model, voice = synthesizer.model, synthesizer.voices[DEFAULT_VOICE]
    stages = bound(model)
    wanted = upstreams["tokens"].to(model.device)
    prompt = text_tokens(model, text)
    drawn = stages.speech_tokens(voice.t3, prompt, sampling=_GREEDY, max_new_tokens=len(wanted))
    length = min(len(drawn), len(wanted))
    differs = (drawn[:length] != wanted[:length]).nonzero()
    hidden = stages.speech_tokens.hidden(voice.t3, prompt, wanted, sampling=_GREEDY)
    seed_everything(_SEED)
    mel = stages.flow(_sounding(model, wanted), voice.gen)
    wanted_mel = upstreams["mel"].to(model.device)
    seed_everything(_SEED)
    sound = stages.vocoder(wanted_mel).cpu()
    error = (sound - upstreams["sound"]).square().sum().clamp(min=1e-30)
    return {
        "greedy_tokens_equal": float(differs[0, 0]) if differs.numel() else float(length),
        "next_tokens_equal": float((_likeliest(model, hidden, wanted) == wanted).float().mean()),
        "mel_difference": float((mel - wanted_mel).abs().max() / wanted_mel.abs().max()),
        "sound_decibels": float(10 * torch.log10(upstreams["sound"].square().sum() / error)),
    }


def _sounding(model: ChatterboxTTS, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of the codebook, as many as are made to sound; random weights draw others too."""
    kept: torch.Tensor = tokens[tokens < model.t3.hp.start_speech_token][:_SOUNDING]
    return kept


def _likeliest(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The greedy choice in the place of each of `tokens`, int64 (n,), given those before it.

    Args:
        model: of upstream.
        hidden: (n, 2, 1024), what each would be drawn from.
        tokens: int64 (n,).
    """
    t3 = model.t3
    normed = rms_norm(hidden, t3.tfmr.norm.weight.to(hidden.dtype))
    logits = functional.linear(normed, t3.speech_head.weight.to(hidden.dtype)).float()
    guided = logits[:, 0] + _GREEDY.cfg_weight * (logits[:, 0] - logits[:, 1])
    before = torch.cat([tokens.new_tensor([t3.hp.start_speech_token]), tokens[:-1]])
    # Row i: which tokens are in the sequence before the i-th.
    used = functional.one_hot(before, guided.size(1)).cumsum(0) > 0
    penalty = _GREEDY.repetition_penalty
    penalized = torch.where(guided < 0, guided * penalty, guided / penalty)
    return torch.where(used, penalized, guided).argmax(dim=1)
