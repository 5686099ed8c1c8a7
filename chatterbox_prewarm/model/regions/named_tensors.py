"""The tensors of a checkpoint by their names, as the three stages of a synthesis take them.

The names are those of upstream's modules and of the published files.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from chatterbox_prewarm.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping


class NamedTensors:
    """The tensors of a module by their names in it.

    Args:
        tensors: by their complete names.
        prefix: the name of the module with a dot at its end; empty for the whole model.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor without autograd.

        Raises:
            WeightsError: the checkpoint does not have it.
        """
        try:
            return self._tensors[self._prefix + name].detach()
        except KeyError:
            raise WeightsError(
                f"the checkpoint lacks the tensor {self._prefix}{name}",
                next_step="check that the files belong to this variant with `chatterbox-prewarm weights verify`",
            ) from None

    def __contains__(self, name: str) -> bool:
        """Return whether the module has a tensor of this name."""
        return self._prefix + name in self._tensors

    def below(self, name: str) -> NamedTensors:
        """Return the tensors of a submodule."""
        return NamedTensors(self._tensors, f"{self._prefix}{name}.")

    def layers(self, name: str) -> list[NamedTensors]:
        """Return the tensors of each entry of a list of modules."""
        prefix = f"{self._prefix}{name}."
        starts = {key[len(prefix) :].partition(".")[0] for key in self._tensors if key.startswith(prefix)}
        numbers = itertools.takewhile(lambda number: str(number) in starts, itertools.count())
        return [self.below(f"{name}.{number}") for number in numbers]

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the bias of a layer. A weight norm (arXiv:1602.07868) is applied."""
        return self._weight(name), self[f"{name}.bias"]

    def pairs(self, *names: str) -> list[torch.Tensor]:
        """Return the weight and the bias of each layer."""
        return [tensor for name in names for tensor in self.pair(name)]

    def _weight(self, name: str) -> torch.Tensor:
        norm = f"{name}.parametrizations.weight.original"
        if f"{self._prefix}{norm}0" not in self._tensors:
            return self[f"{name}.weight"]
        return torch._weight_norm(self[f"{norm}1"], self[f"{norm}0"], 0).contiguous()
