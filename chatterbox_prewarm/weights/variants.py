"""The table of the Chatterbox variants. Importing this module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from chatterbox_prewarm.errors import BadInputError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A Chatterbox variant: the location and the files of its checkpoint.

    Attributes:
        name: the name of the variant on the command line.
        repository: the repository of the checkpoint on the model hub.
        revision: the default commit of `weights fetch`. Upstream does not pin one.
        files: all files of the checkpoint.
        safetensors: the files that hold tensors and must not be pickles.
        builtin_voice: the file with upstream's voice. It is a pickle, so it is only read with `weights_only`.
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
    """Return the variant with this name.

    Raises:
        BadInputError: there is no such variant.
    """
    try:
        return VARIANTS[name]
    except KeyError:
        raise BadInputError(
            f"there is no model variant {name!r}", next_step=f"choose one of: {', '.join(VARIANTS)}"
        ) from None
