"""Family `conditionals`: the voices, one safetensors file each.

Computing a voice takes about 18 s in a fresh process; reading it takes a few milliseconds. The keys of a file are
`t3.NAME` and `gen.NAME` for the two halves of `Conditionals`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family, tensor_bytes
from chatterbox_prewarm.model.conditionals import Conditionals, T3Conditionals

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from chatterbox_prewarm.families.base import FamilyContext

SUFFIX = ".safetensors"
_T3_KEYS = ("speaker_emb", "cond_prompt_speech_tokens", "emotion_adv")
_GEN_KEYS = ("prompt_token", "prompt_token_len", "prompt_feat", "prompt_feat_len", "embedding")


class ConditionalsFamily(Family):
    """See the module's docstring."""

    name = "conditionals"
    timers = ("conditionals",)

    def attach(self, directory: Path | None, context: FamilyContext) -> None:
        """Read all voices onto the model's device."""
        if directory is None:
            return
        with context.metrics.phase("conditionals"):
            for path in sorted(directory.glob(f"*{SUFFIX}")):
                context.voices[path.stem] = load_voice(path, device=context.device)
                context.metrics.hit("conditionals")

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:
        """Write all voices."""
        for name, voice in context.voices.items():
            save_voice(voice, directory / f"{name}{SUFFIX}")
        return ("weights", "variant", "chatterbox")


def save_voice(voice: Conditionals, path: Path) -> None:
    """Write conditionals. Equal conditionals give equal bytes."""
    path.write_bytes(tensor_bytes(voice_tensors(voice)))


def load_voice(path: Path, *, device: str = "cpu") -> Conditionals:
    """Read conditionals. `model.voices.prepare_voice` documents the shapes and dtypes."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device=device) as file:  # type: ignore[no-untyped-call]
        return voice_of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no dictionary


def voice_tensors(voice: Conditionals) -> dict[str, torch.Tensor]:
    """Return the tensors of conditionals by their names in a file."""
    tensors = {f"t3.{key}": getattr(voice.t3, key) for key in _T3_KEYS}
    return tensors | {f"gen.{key}": voice.gen[key] for key in _GEN_KEYS if voice.gen.get(key) is not None}


def voice_of(tensors: Mapping[str, torch.Tensor]) -> Conditionals:
    """Build conditionals from the result of `voice_tensors`."""
    return Conditionals(
        t3=T3Conditionals(**{key: tensors[f"t3.{key}"] for key in _T3_KEYS}),
        gen={key: tensors[f"gen.{key}"] for key in _GEN_KEYS if f"gen.{key}" in tensors},
    )
