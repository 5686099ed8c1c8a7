"""Check that a checkpoint has the tensors of its variant. Importing this module does not import torch.

The expected tensors lie in `tensors.json`: in groups that `Variant.shapes` names, the name of a tensor → [dtype,
shape]. In a shape, a word is an attribute of the variant, which may have a factor. In the names of a stack of equal
layers, `*` is the number of the layer. A synthetic checkpoint may have fewer layers than published.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.weights.safetensors_header import read_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Iterable

    from chatterbox_prewarm.weights.record import Synthetic
    from chatterbox_prewarm.weights.variants import Variant

#: The stack of layers of a T3 that is a Llama, and of one that is a GPT-2.
_T3_STACKS = ("tfmr.layers", "tfmr.h")
#: The stacks of equal layers of S3Gen, and their published numbers of layers.
_LAYERS = {
    "flow.encoder.encoders": 6,
    "flow.encoder.up_encoders": 4,
    "flow.decoder.estimator.mid_blocks": 12,
    "tokenizer.encoder.blocks": 6,
}
_STACKS = re.compile(rf"^({'|'.join(map(re.escape, (*_T3_STACKS, *_LAYERS)))})\.\d+\.")
#: Constants that upstream's constructor computes, so that a file may lack them.
COMPUTED = frozenset({"tokenizer._mel_filters", "tokenizer.window"})
#: Dtypes that are read in place of float32.
_FLOATS = frozenset({"F32", "F16", "BF16"})
_STEP = "check that the files belong to this variant, and that a fine-tune kept upstream's names and shapes"


def check_tensors(directory: Path, variant: Variant, synthetic: Synthetic | None = None) -> None:
    """Compare the names, dtypes and shapes in the headers of a checkpoint's files with the variant.

    S3Gen's file may have more tensors, which upstream ignores too.

    Args:
        directory: of the checkpoint.
        variant: its variant.
        synthetic: how a synthetic checkpoint was made; None for a real one, which has all layers.

    Raises:
        WeightsError: naming the first tensor that is missing, unknown, or has another dtype or shape.
    """
    for part, expected in expected_tensors(variant).items():
        path = directory / variant.tensor_files[part]
        header = read_safetensors_header(path)
        extra = []
        for tensor, (dtype, shape) in header.items():
            wanted = expected.get(_STACKS.sub(r"\1.*.", tensor))
            if wanted is None:
                extra.append(tensor)
                continue
            wanted_dtype, wanted_shape = wanted
            if list(shape) != wanted_shape:
                raise WeightsError(
                    f"{path}: {tensor} has shape {list(shape)}, the model {variant.name} needs {wanted_shape}",
                    next_step=_STEP,
                )
            if dtype not in (_FLOATS if wanted_dtype in _FLOATS else {wanted_dtype}):
                raise WeightsError(
                    f"{path}: {tensor} has dtype {dtype}, the model needs {wanted_dtype}", next_step=_STEP
                )
        names = _all_names(expected, variant, synthetic)
        surplus = {tensor for tensor in header if _STACKS.match(tensor)} - names
        missing = sorted(names - header.keys() - COMPUTED)
        if missing:
            raise WeightsError(f"{path} lacks {len(missing)} tensor(s), the first: {missing[0]}", next_step=_STEP)
        if part != "s3gen":
            surplus.update(extra)
        if surplus:
            raise WeightsError(
                f"{path} has {len(surplus)} unknown tensor(s), the first: {min(surplus)}", next_step=_STEP
            )


def expected_tensors(variant: Variant) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """Return the dtype and the shape of each tensor of a variant, by the part of the model and by the name."""
    groups = json.loads(Path(__file__).with_name("tensors.json").read_text(encoding="utf-8"))
    return {
        part: {
            name: (dtype, [_size(entry, variant) for entry in shape])
            for group in names
            for name, (dtype, shape) in groups[group].items()
        }
        for part, names in variant.shapes.items()
    }


def _size(entry: int | str, variant: Variant) -> int:
    """Return a size of a shape, which may be given as an attribute of the variant, such as "3*t3_width"."""
    if isinstance(entry, int):
        return entry
    factor, _, attribute = entry.rpartition("*")
    size: int = getattr(variant, attribute)
    return int(factor or 1) * size


def _all_names(expected: Iterable[str], variant: Variant, synthetic: Synthetic | None) -> set[str]:
    """Return the names of all tensors, with the number of each layer."""
    names = set()
    for name in expected:
        stack, star, rest = name.partition(".*.")
        if not star:
            names.add(name)
            continue
        is_t3 = stack in _T3_STACKS
        count = variant.t3_layers if is_t3 else _LAYERS[stack]
        if synthetic is not None:
            shortened = synthetic.t3_layers if is_t3 else synthetic.s3gen_blocks
            count = min(count, shortened or count)
        names |= {f"{stack}.{number}.{rest}" for number in range(count)}
    return names
