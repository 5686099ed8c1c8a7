"""Constructing modules without filling their weights, which a checkpoint is about to replace.

Filling 800 million parameters with random numbers is 13 s of an upstream start. Non-persistent buffers and plain
tensor attributes (position tables, windows, fades) are still computed, which a meta device would lose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# By name, since transformers puts its own functions in the place of torch.nn.init's while it constructs; and the
# initialisers beside the fills that they end in, since a mode is off while one of its functions runs.
_RANDOM_FILLS = frozenset(
    {
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "orthogonal_",
        "trunc_normal_",
        "uniform_",
        "xavier_normal_",
        "xavier_uniform_",
    }
)


class Uninitialized(TorchFunctionMode):
    """While active, in-place random fills return their tensor as it is; memory that is not written costs nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Skip the fills, pass everything else through."""
        if getattr(func, "__name__", "") in _RANDOM_FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
