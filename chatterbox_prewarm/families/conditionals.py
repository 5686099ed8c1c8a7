"""Family `conditionals`: the voices, one safetensors file each.

A voice costs some 18 s to make in a fresh process and a few milliseconds to read. Keys are `t3.NAME` and `gen.NAME`
for the two halves of upstream's `Conditionals`; what is None there is absent here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.tensors import write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from chatterbox.tts import Conditionals

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

SUFFIX = ".safetensors"
_T3_KEYS = ("speaker_emb", "cond_prompt_speech_tokens", "emotion_adv")
_GEN_KEYS = ("prompt_token", "prompt_token_len", "prompt_feat", "prompt_feat_len", "embedding")


class ConditionalsFamily(Family):
    """See the module's docstring."""

    name = "conditionals"
    timers = ("conditionals",)

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """To all."""
        return True

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Nothing to set."""
        return {}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:
        """Nothing to do: voices are tensors."""

    def watch(self, metrics: WarmupMetrics) -> None:
        """Nothing to do: a voice that has to be made is counted where it is made."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Read all voices onto the model's device."""
        if directory is None:
            return
        synthesizer = session.synthesizer
        with session.metrics.phase("conditionals"):
            for path in sorted(directory.glob(f"*{SUFFIX}")):
                synthesizer.voices[path.stem] = load_voice(path, device=synthesizer.model.device)
                session.metrics.hit("conditionals")

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Write all voices."""
        for name, voice in session.synthesizer.voices.items():
            save_voice(voice, directory / f"{name}{SUFFIX}")
        return ("weights", "variant", "chatterbox")


def save_voice(voice: Conditionals, path: Path) -> None:
    """Write conditionals, before any generation has changed them; equal conditionals give equal bytes."""
    write_tensors(voice_tensors(voice), path)


def load_voice(path: Path, *, device: str = "cpu") -> Conditionals:
    """Read conditionals; shapes and dtypes are `prepare_voice`'s."""
    from safetensors.torch import load_file

    return voice_of(load_file(path, device=device))


def voice_tensors(voice: Conditionals) -> dict[str, torch.Tensor]:
    """The tensors of conditionals by the names that they have in a file."""
    tensors = {f"t3.{key}": getattr(voice.t3, key) for key in _T3_KEYS}
    return tensors | {f"gen.{key}": voice.gen[key] for key in _GEN_KEYS if voice.gen.get(key) is not None}


def voice_of(tensors: Mapping[str, torch.Tensor]) -> Conditionals:
    """Conditionals of the tensors that `voice_tensors` gave."""
    from chatterbox.tts import Conditionals, T3Cond

    return Conditionals(
        T3Cond(**{key: tensors[f"t3.{key}"] for key in _T3_KEYS}),
        {key: tensors.get(f"gen.{key}") for key in _GEN_KEYS},
    )
