"""The tables of T3's rotary position embedding."""

from __future__ import annotations

import math

import torch

from chatterbox_prewarm.model.regions.t3_blocks import HEAD_SIZE

#: Upstream's settings of the rotary embedding (`LLAMA_520M_CONFIG_DICT`), scaled as in Llama 3.1 (arXiv:2407.21783).
_ROPE_BASE = 500_000.0
_ROPE_FACTOR, _ROPE_LOW, _ROPE_HIGH, _ROPE_LENGTH = 8.0, 1.0, 4.0, 8192


def rotary_tables(positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cosines and sines of T3's rotary embedding: float32 (positions, 64) each.

    The frequencies are those of Llama 3.1: long wavelengths are stretched, short ones are not, and those between are
    blended.
    """
    frequencies = 1.0 / (_ROPE_BASE ** (torch.arange(0, HEAD_SIZE, 2, dtype=torch.float32, device=device) / HEAD_SIZE))
    wavelengths = 2 * math.pi / frequencies
    share = (_ROPE_LENGTH / wavelengths - _ROPE_LOW) / (_ROPE_HIGH - _ROPE_LOW)
    blended = (1 - share) * frequencies / _ROPE_FACTOR + share * frequencies
    scaled = torch.where(wavelengths > _ROPE_LENGTH / _ROPE_LOW, frequencies / _ROPE_FACTOR, blended)
    scaled = torch.where(wavelengths < _ROPE_LENGTH / _ROPE_HIGH, frequencies, scaled)
    angles = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * scaled
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()
