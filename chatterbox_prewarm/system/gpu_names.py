"""Product names of GPUs as NVML reports them. The labels of nodes and the comparison of fingerprints depend on them."""

from __future__ import annotations

import difflib
import re

from chatterbox_prewarm.errors import BadInputError

#: Product names that NVML reports. A newer product may be missing here; see `nvml_name`.
_PRODUCTS = (
    *("Tesla T4", "Tesla V100-PCIE-16GB", "Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
    *("NVIDIA A2", "NVIDIA A10", "NVIDIA A10G", "NVIDIA A16", "NVIDIA A30", "NVIDIA A40", "NVIDIA RTX A6000"),
    *("NVIDIA A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"),
    *("NVIDIA L4", "NVIDIA L40", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation"),
    *("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB"),
    *("NVIDIA H20", "NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA B200", "NVIDIA GB200"),
    *("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 5090"),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
)
#: Beginnings of the names that NVML reports.
_BRANDS = ("NVIDIA ", "Tesla ", "Quadro ", "GRID ")
#: Words that users leave out.
_OPTIONAL = {"nvidia", "tesla", "geforce", "rtx"}


def nvml_name(text: str) -> str:
    """Return the product name for a user's spelling, such as "L4" or "nvidia-l4". A product name is returned unchanged.

    A name that begins like a product name is accepted even if this version does not know the product, because a new GPU
    must be usable. A name of several products is refused, because a warm state is for one of them.

    Raises:
        BadInputError: the name fits no product, or several; the message lists similar names.
    """
    if text in _PRODUCTS:
        return text
    words = _words(text)
    same = [product for product in _PRODUCTS if _words(product) == words]
    begin = [product for product in _PRODUCTS if words and _words(product)[: len(words)] == words]
    candidates = same or begin
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise BadInputError(
            f"{text!r} is the name of several GPUs: {', '.join(candidates)}", next_step="write one of these names"
        )
    if text.startswith(_BRANDS):
        return text
    by_short_name = {" ".join(_words(product)): product for product in _PRODUCTS}
    near = difflib.get_close_matches(" ".join(words), by_short_name, n=2, cutoff=0.4)
    hint = f", perhaps {' or '.join(by_short_name[name] for name in near)}" if near else ""
    raise BadInputError(
        f"{text!r} is not the name of a GPU{hint}",
        next_step="write the name that `nvidia-smi --query-gpu=name --format=csv,noheader` prints on the node",
    )


def _words(name: str) -> list[str]:
    """Split a name into words, and drop the words that users leave out."""
    return [word for word in re.split(r"[\s_-]+", name.lower().strip()) if word not in _OPTIONAL]
