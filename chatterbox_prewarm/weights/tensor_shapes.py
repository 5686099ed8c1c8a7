"""Check that the tensors of a checkpoint are those of its variant. Importing this module does not import torch.

The expected tensors lie in `VARIANT_tensors.json`: for each file, the name of a tensor → [dtype, shape]. In the names
of a stack of equal layers, `*` is the number of the layer, because a synthetic checkpoint may have fewer layers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.weights.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from chatterbox_prewarm.weights.variants import Variant

#: The stacks of equal layers.
_STACKS = re.compile(
    r"(tfmr\.layers|flow\.encoder\.encoders|flow\.encoder\.up_encoders|mid_blocks|tokenizer\.encoder\.blocks)\.(\d+)\."
)
#: Constants that upstream's constructor computes, so that a file may lack them.
COMPUTED = frozenset({"tokenizer._mel_filters", "tokenizer.window"})
#: Dtypes that are read in place of float32.
_FLOATS = frozenset({"F32", "F16", "BF16"})
_STEP = "check that the files belong to this variant, and that a fine-tune kept upstream's names and shapes"


def check_tensors(directory: Path, variant: Variant) -> None:
    """Compare names, dtypes and shapes in the headers of a checkpoint's files with those of the variant.

    S3Gen's file may have more tensors, which upstream ignores too.

    Raises:
        WeightsError: naming the first tensor that is missing, unknown, or has another dtype or shape.
    """
    data = Path(__file__).with_name(f"{variant.name}_tensors.json").read_text(encoding="utf-8")
    for name, expected in json.loads(data).items():
        path = directory / name
        header = read_safetensors_header(path)
        layers: dict[str, set[int]] = {}
        extra = []
        for tensor, (dtype, shape) in header.items():
            stack = _STACKS.search(tensor)
            if stack is not None:
                layers.setdefault(stack[1], set()).add(int(stack[2]))
            wanted = expected.get(_STACKS.sub(r"\1.*.", tensor))
            if wanted is None:
                extra.append(tensor)
            elif shape != tuple(wanted[1]):
                raise WeightsError(
                    f"{path}: {tensor} has shape {list(shape)}, the model needs {wanted[1]}", next_step=_STEP
                )
            elif dtype not in (_FLOATS if wanted[0] in _FLOATS else {wanted[0]}):
                raise WeightsError(f"{path}: {tensor} has dtype {dtype}, the model needs {wanted[0]}", next_step=_STEP)
        missing = sorted(_all_names(expected, layers) - header.keys() - COMPUTED)
        if missing:
            raise WeightsError(f"{path} lacks {len(missing)} tensor(s), the first: {missing[0]}", next_step=_STEP)
        if extra and name != "s3gen.safetensors":
            raise WeightsError(f"{path} has {len(extra)} unknown tensor(s), the first: {min(extra)}", next_step=_STEP)


def _all_names(expected: dict[str, object], layers: dict[str, set[int]]) -> set[str]:
    """Return the expected names with the numbers of the layers that a file has, from 0 to the last, at least one."""
    names = set()
    for name in expected:
        stack, star, rest = name.partition(".*.")
        if not star:
            names.add(name)
            continue
        last = max(next((found for key, found in layers.items() if stack.endswith(key)), {0}))
        names |= {f"{stack}.{number}.{rest}" for number in range(last + 1)}
    return names
