"""Shared code of the English and the Multilingual model, whose T3 is a Llama with guidance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.model.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from chatterbox_prewarm.weights.variants import Variant

#: Settings with which sampling always draws the most likely token.
GREEDY = Sampling(min_p=1.0)


def t3_config(variant: Variant) -> Any:
    """Return the configuration with which upstream constructs T3."""
    from chatterbox.models.t3.modules.t3_config import T3Config

    return T3Config(variant.text_vocabulary)


def s3gen_arguments() -> dict[str, Any]:
    """Return no arguments: upstream constructs S3Gen with its defaults."""
    return {}


def upstream_speech_tokens(
    model: Any, conditionals: Any, text_ids: Sequence[int], *, sampling: Sampling, max_new_tokens: int
) -> torch.Tensor:
    """Draw speech tokens with upstream's T3; see `VariantCode`."""
    import torch

    hp = model.t3.hp
    prompt = torch.tensor([[hp.start_text_token, *text_ids, hp.stop_text_token]], device=model.device)
    tokens: torch.Tensor = model.t3.inference(
        t3_cond=conditionals,
        text_tokens=prompt.repeat(2, 1),  # with and without guidance
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        cfg_weight=sampling.cfg_weight,
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )
    return tokens[0]


def limit_upstream(model: Any, max_new_tokens: int) -> None:
    """Limit the speech tokens of upstream's `generate`; see `VariantCode`.

    Tokens without a sound, which trained weights never draw, are left out: the Multilingual model fails at them.
    """
    inference, stop = model.t3.inference, model.t3.hp.stop_speech_token

    def limited(**arguments: Any) -> Any:
        tokens = inference(**{**arguments, "max_new_tokens": max_new_tokens})
        return tokens[:, tokens[0] <= stop]

    model.t3.inference = limited
