"""A function of limited sight over a signal that comes in pieces: what it gives for the whole, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Windows:
    """Runs a function on windows that overlap by as much as it sees, and keeps what no edge of a window has touched.

    Args:
        function: takes (..., units), gives (samples,), as many for each unit.
        context: how many units to each side an output depends on.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], *, context: int) -> None:
        self._function = function
        self._context = context
        self._held: torch.Tensor | None = None
        self._done = 0  # of the units that are held

    def __call__(self, piece: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Take more of the signal.

        Args:
            piece: (..., units), which may be none.
            last: that nothing follows; then all that is held back is given too.

        Returns:
            (samples,), of the units that are now out of reach of what may follow.
        """
        held = piece if self._held is None else torch.cat([self._held, piece], dim=-1)
        ready = held.size(-1) - (0 if last else self._context)
        if ready <= self._done:
            self._held = held
            return piece.new_empty(0)
        found = self._function(held.contiguous())
        factor = found.numel() // held.size(-1)
        fresh = found[factor * self._done : factor * ready]
        begin = max(0, ready - self._context)
        self._held, self._done = held[..., begin:], ready - begin
        return fresh
