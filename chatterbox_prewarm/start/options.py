"""The options of a start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.signature import Trust

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.model.profiles import Execution

POLICIES = ("require", "fallback", "off")


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """The options of a start.

    Attributes:
        warm: the directory of a warm state, or of several, of which the best one is used; never written to.
        weights: the directory of the checkpoint.
        cache: a writable directory for the caches of compilers and Numba.
        device: a torch device as upstream takes it, a string such as "cpu" or "cuda:0".
        policy: "require" raises an error for a family that does not fit, "fallback" leaves the family out, "off"
            ignores the state.
        profile: how the model runs; by default as the state was baked, and `eager` without a state.
        trust: a key or a digest that the state must match. A state that does not counts as missing.
        plain_text: languages whose texts may lack the marks that their pronunciation needs.
        converts: load what converts speech, and not what speaks texts. The same warm state serves both.
        execution: for a bake: the profile together with its other settings.
        compiled: for a bake: a folder with one folder for each family that was compiled before this start.

    Raises:
        BadInputError: there is no such policy.
    """

    warm: Path
    weights: Path
    cache: Path
    device: str = "cpu"
    policy: str = "fallback"
    profile: str | None = None
    trust: Trust = field(default_factory=Trust)
    plain_text: tuple[str, ...] = ()
    converts: bool = False
    execution: Execution | None = None
    compiled: Path | None = None

    def __post_init__(self) -> None:
        check_policy(self.policy)


def check_policy(policy: str) -> None:
    """Check the name of a policy.

    Raises:
        BadInputError: there is no such policy.
    """
    if policy not in POLICIES:
        raise BadInputError(f"there is no policy {policy!r}", next_step=f"choose one of: {', '.join(POLICIES)}")
