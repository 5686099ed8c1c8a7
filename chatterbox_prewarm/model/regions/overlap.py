"""Apply a function with limited context to a signal that arrives in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class OverlappingWindows:
    """Applies a function to overlapping windows of a signal.

    The outputs together equal the output for the complete signal: each window overlaps its neighbours by the function's
    context, and outputs that depend on the edge of a window are discarded.

    Args:
        function: takes (..., units) and returns (samples,), the same number of samples for each unit.
        context: the number of units on each side that an output depends on.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], *, context: int) -> None:
        self._function = function
        self._context = context
        self._window: torch.Tensor | None = None
        self._done = 0  # the number of units in the window whose output was returned

    def __call__(self, piece: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Process the next piece of the signal.

        Args:
            piece: (..., units); may have 0 units.
            last: no piece follows, so return the outputs of all remaining units.

        Returns:
            (samples,), the outputs that later pieces cannot change.
        """
        window = piece if self._window is None else torch.cat([self._window, piece], dim=-1)
        ready = window.size(-1) - (0 if last else self._context)
        if ready <= self._done:
            self._window = window
            return piece.new_empty(0)
        output = self._function(window.contiguous())
        factor = output.numel() // window.size(-1)
        fresh = output[factor * self._done : factor * ready]
        begin = max(0, ready - self._context)
        self._window, self._done = window[..., begin:], ready - begin
        return fresh
