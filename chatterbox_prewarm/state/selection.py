"""Select the state that a machine uses, from a folder of several.

A start reads every manifest, but opens only the files of the state that it uses.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import BadInputError, FingerprintMismatchError, IntegrityError, from_os_error
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.state.ownership import refuse_changeable
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.weights.checkpoints import checkpoints_in, choose_checkpoints
from chatterbox_prewarm.weights.record import RECORD_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from chatterbox_prewarm.errors import PrewarmError
    from chatterbox_prewarm.state.compatibility import Compatibility
    from chatterbox_prewarm.state.signature import Trust

    Facts = Callable[[State], Mapping[str, str]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The wishes of a start.

    Attributes:
        device: the device of the start; by default the one that each state was baked for.
        profile: the profile to run; by default the one that each state was baked for.
        name: the state to use, even if it does not fit.
        strict: refuse a state of several that does not fit.
        trust: a key or a digest that the selected state must match.
    """

    device: str | None = None
    profile: str | None = None
    name: str | None = None
    strict: bool = False
    trust: Trust | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The state that a start uses.

    Attributes:
        state: its folder was checked.
        compatibility: how it fits the machine.
        unusable: a sentence for each state that cannot be read, and its next step.
        remarks: one line for each state of several: which one is used, and why the others are not.
    """

    state: State
    compatibility: Compatibility
    unusable: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def states_in(folder: Path) -> dict[str, Path]:
    """List the states of a folder by the names of their directories, or the folder itself if it is a state.

    If one directory holds a manifest, all of them count as states, so that a damaged one is noticed. Hidden
    directories belong to a running bake.
    """
    if os.path.lexists(folder / MANIFEST_NAME):
        return {folder.absolute().name: folder}
    try:
        directories = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."}
    except OSError:
        return {}  # reading it as a state says what is wrong
    if any(os.path.lexists(path / MANIFEST_NAME) for path in directories.values()):
        return directories
    return {}


def state_path(folder: Path, name: str | None = None) -> Path:
    """Return the directory of the state with this name, or of the only state.

    Raises:
        BadInputError: there is no state with this name, or there are several and no name is given.
    """
    states = states_in(folder)
    if name is None and len(states) < 2:
        return next(iter(states.values()), folder)
    if name in states:
        return states[name]
    listed = ", ".join(states) or "none"
    if name is None:
        raise BadInputError(f"{folder} holds {len(states)} states: {listed}", next_step="name one with --state")
    raise BadInputError(f"{folder} has no state {name!r}; it has: {listed}", next_step="name one of them")


def checkpoints_for(weights: Path, warm: Path, name: str | None = None) -> dict[str, Path]:
    """Return the checkpoints to use with the states of a folder, by variant: all, or that of the state with a name.

    A directory without checkpoints is returned itself, by the variant "". Reading it says what is wrong.

    Raises:
        WeightsError, BadInputError: as `checkpoints_in`, `choose_checkpoints` and `state_path`.
        IntegrityError, OSError: the state with this name cannot be read.
    """
    if not any(weights.glob(f"*/{RECORD_NAME}")):
        return {"": weights}
    found = checkpoints_in(weights)
    if name is None or len(found) < 2:
        return found
    return choose_checkpoints(weights, [State.read(state_path(warm, name)).manifest.variant])


def select_state(folder: Path, facts: Facts, request: Request) -> Selection:
    """Select the state of a folder that fits this machine best.

    Only states for the variant of the weights are compared. A state for the requested device comes first, then one that
    fits completely, then one with the requested profile, then the one with most bytes of compiled families that fit,
    most families, most bytes, fewest different facts, and the first name. If the folder is itself a state, or a name is
    given, there is nothing to compare.

    Args:
        folder: a state, or a folder of states.
        facts: returns the facts of this machine for a state, as `machine_facts` does.
        request: the wishes of the start.

    Raises:
        IntegrityError: no state can be read or is trusted, or other users own the folder or can write it.
        FingerprintMismatchError: all states are for other variants; or, with `strict`, several states were compared and
            none fits.
        BadInputError: there is no state with the given name.
        OSError: the only state cannot be read.
    """
    states = states_in(folder)
    if request.name is not None or not states or folder in states.values():
        state = State.open(state_path(folder, request.name), request.trust)
        _check_variant(state, facts)
        return Selection(state=state, compatibility=_compare(state, facts, request))
    refuse_changeable(folder, [folder])
    candidates, unusable = _read_candidates(states, facts, request)
    candidates.sort(key=lambda candidate: candidate[1].rank)
    while candidates:
        try:
            candidates[0][0].check_folder()
        except (IntegrityError, OSError) as error:
            found = from_os_error(error, "reading the state") if isinstance(error, OSError) else error
            unusable[candidates.pop(0)[1].name] = found
        else:
            break
    return _take_first(folder, candidates, unusable, request)


def _read_candidates(
    states: Mapping[str, Path], facts: Facts, request: Request
) -> tuple[list[tuple[State, Compatibility]], dict[str, PrewarmError]]:
    """Read the states for the variant of the weights. Return them, and why each other one of them cannot be read.

    Raises:
        FingerprintMismatchError: all states are for other variants.
    """
    candidates: list[tuple[State, Compatibility]] = []
    unusable: dict[str, PrewarmError] = {}
    foreign: list[FingerprintMismatchError] = []
    for name, path in states.items():
        if path.is_symlink():
            unusable[name] = IntegrityError(
                f"{path} is a link", next_step="replace the link by the folder of the state"
            )
            continue
        try:
            state = State.read(path)
            _check_variant(state, facts)
        except FingerprintMismatchError as error:
            logger.info("the state %s is left out: %s", name, error.message)
            foreign.append(error)
        except IntegrityError as error:
            unusable[name] = error
        else:
            candidates.append((state, _compare(state, facts, request)))
    if foreign and not (candidates or unusable):
        raise foreign[0]
    return candidates, unusable


def _check_variant(state: State, facts: Facts) -> None:
    """Refuse a state for another model than the weights of this machine.

    Raises:
        FingerprintMismatchError: see above.
    """
    needed = facts(state).get("variant", state.manifest.variant)
    if state.manifest.variant != needed:
        raise FingerprintMismatchError(
            f"{state.path} is for the model variant {state.manifest.variant}, and the weights are {needed}",
            next_step="use a state that was baked with these weights",
        )


def _compare(state: State, facts: Facts, request: Request) -> Compatibility:
    return state.compatibility(facts(state), device=request.device, profile=request.profile)


def _take_first(
    folder: Path, candidates: list[tuple[State, Compatibility]], unusable: Mapping[str, PrewarmError], request: Request
) -> Selection:
    """Take the best candidate, log why, and check that it is trusted."""
    warnings = {f"the state {name} is left out: {error.message}": error.next_step for name, error in unusable.items()}
    if not candidates:
        raise IntegrityError(
            f"no state of {folder} can be used: {'; '.join(warnings)}",
            next_step="restore them, or bake again with `chatterbox-prewarm bake`",
        )
    state, best = candidates[0]
    if request.strict and not best.fits:
        reasons = [f"{other.name}: {other.explain()}" for _, other in candidates]
        reasons += [f"{name}: {error.message}" for name, error in unusable.items()]
        raise FingerprintMismatchError(
            f"no state of {folder} fits this machine: {' | '.join(reasons)}",
            next_step="bake on this kind of machine and add that state, or start with the policy fallback to run cold",
        )
    used = f"the state {best.name} is used" + ("" if best.fits else f", but only a part fits: {best.explain()}")
    left_out = [f"the state {other.name} is left out: {other.why_not_selected(best)}" for _, other in candidates[1:]]
    for line in (used, *left_out):
        logger.info("%s", line)
    for line in warnings:
        logger.warning("%s", line)
    if request.trust is not None:
        state = replace(state, trusted_by=request.trust.check(state.path, state.manifest_bytes))
    return Selection(state=state, compatibility=best, unusable=warnings, remarks=(used, *left_out, *warnings))
