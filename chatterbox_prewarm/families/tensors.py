"""Writing a family's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors of any device as a safetensors file; equal tensors give equal bytes.

    Raises:
        OSError: what the system said. Python writes, since safetensors' own writer hides it, a full disk for one.
    """
    path.write_bytes(tensor_bytes(tensors))


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors of any device as the bytes of a safetensors file; without metadata, equal tensors give equal bytes."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return bytes(save(plain, dict(metadata) if metadata else None))
