"""The Chatterbox variants: one module each, behind this registry. Importing this package imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_prewarm.errors import BadInputError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a Chatterbox variant is made of, as far as it can be said without torch.

    Attributes:
        name: how the command line names it.
        repository: the model hub's repository.
        revision: the commit that `weights fetch` takes when none is given. Upstream pins none.
        files: every file of the checkpoint, in the order of their use.
        safetensors: those of `files` that hold tensors and must not be pickles.
        builtin_voice: the file with upstream's own voice, a pickle that is read with `weights_only`, at bake and by a
            start that has no baked voice.
    """

    name: str
    repository: str
    revision: str
    files: tuple[str, ...]
    safetensors: tuple[str, ...]
    builtin_voice: str


ENGLISH = Variant(
    name="english",
    repository="ResembleAI/chatterbox",
    revision="5bb1f6ee58e50c3b8d408bc82a6d3740c2db6e18",
    files=("tokenizer.json", "ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors", "conds.pt"),
    safetensors=("ve.safetensors", "t3_cfg.safetensors", "s3gen.safetensors"),
    builtin_voice="conds.pt",
)

VARIANTS = {variant.name: variant for variant in (ENGLISH,)}


def get_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        BadInputError: there is none.
    """
    try:
        return VARIANTS[name]
    except KeyError:
        raise BadInputError(
            f"there is no model variant {name!r}", next_step=f"choose one of: {', '.join(VARIANTS)}"
        ) from None
