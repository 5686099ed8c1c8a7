"""The conditionals of a voice: the features of a reference clip that T3 and S3Gen use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, kw_only=True)
class T3Conditionals:
    """What T3 uses of a voice. Upstream's `T3Cond` has these attributes too.

    Attributes:
        speaker_emb: float32 (1, 256).
        cond_prompt_speech_tokens: int64 (1, n), at most `Variant.prompt_tokens`.
        emotion_adv: float32 (1, 1, 1), the strength of the emotion; Turbo has none.
    """

    speaker_emb: torch.Tensor
    cond_prompt_speech_tokens: torch.Tensor
    emotion_adv: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Conditionals:
    """A voice. Upstream's `Conditionals` has these attributes too.

    Attributes:
        t3: for T3.
        gen: for S3Gen: `prompt_token` int64 (1, m), `prompt_token_len` int64 (1,), `prompt_feat` float32
            (1, 2m or 2m + 1, 80), `embedding` float32 (1, 192). Upstream's `prompt_feat_len` is None.
    """

    t3: T3Conditionals
    gen: Mapping[str, torch.Tensor]
