"""Options of `bench report`, and the checks before minutes are spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.room import OTHER_BYTES, STATE_BYTES, check_disk, check_memory
from chatterbox_prewarm.bench.starts import checkpoint, machine, versions
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.state.places import check_apart, check_output_place
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: The parts of a report in their order.
PARTS = (
    "state",
    "starts",
    "requests",
    "calls",
    "memory",
    "levels",
    "ablation",
    "profiles",
    "growth",
    "load",
    "quality",
)
#: Name of the second warm start in each round. It shows the noise, because both starts are the same.
WARM_AGAIN = "warm again"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of a report.

    Attributes:
        weights: directory of the checkpoint.
        warm: warm state of the warm starts, baked for this machine.
        output: folder for the results.
        device: torch device.
        rounds: fresh processes of each system.
        profiles: profiles to bake and to compare.
        parts: names from `PARTS` of the parts to measure.
        clients: numbers of concurrent clients.
        requests: requests of each client.
    """

    weights: Path
    warm: Path
    output: Path
    device: str = "cpu"
    rounds: int = 3
    profiles: Sequence[str] = PROFILES
    parts: Sequence[str] = PARTS
    clients: Sequence[int] = (1, 4, 16)
    requests: int = 3

    @property
    def results(self) -> Path:
        """The JSON file with the results."""
        return self.output / "results.json"

    @property
    def states(self) -> Path:
        """The folder for the states that a report bakes; it is removed at the end."""
        return self.output / "states"

    @property
    def audio(self) -> Path:
        """The folder for the audio that is compared."""
        return self.output / "audio"

    @property
    def cache(self) -> Path:
        """The cache directory of these bakes."""
        return self.states / "cache"

    def plan(self) -> dict[str, Any]:
        """Return the conditions of the results as JSON values. Other parts can be added later."""
        return {
            "tool": __version__,
            "machine": machine(),
            "versions": versions(),
            "device": self.device,
            "weights": checkpoint(self.weights),
            "state": State.read(self.warm).manifest.set_digest,
            "rounds": self.rounds,
            "profiles": list(self.profiles),
            "clients": list(self.clients),
            "requests": self.requests,
        }

    def check(self) -> None:
        """Check the options, the free disk space and the free memory.

        Raises:
            BadInputError: an option is invalid, or there is too little space or memory.
            PrewarmError: the state or the checkpoint cannot be read.
        """
        for kind, given, known in (("part", self.parts, PARTS), ("profile", self.profiles, PROFILES)):
            if unknown := sorted(set(given) - set(known)):
                raise BadInputError(f"there is no {kind} {unknown[0]!r}", next_step=f"choose from {', '.join(known)}")
        for value in (self.rounds, self.requests, *self.clients):
            if not isinstance(value, int) or value < 1:
                raise BadInputError(
                    f"{value!r} is not a number of rounds, requests or clients", next_step="give whole numbers from 1"
                )
        self._check_places()
        loads = "load" in self.parts
        check_memory(
            self.weights,
            purpose="a report with these parts",
            processes=2 if loads else 1,
            instead=", or leave out the part `load`, which runs two workers" if loads else "",
        )
        self.output.mkdir(parents=True, exist_ok=True)
        check_disk(self.output, (len(self.profiles) + 1) * STATE_BYTES + OTHER_BYTES, purpose="a report")

    def _check_places(self) -> None:
        """Check that the report writes and removes only its own files. It removes the folder `states` at the end.

        Raises:
            BadInputError: the report would replace other files; the message names the path to change.
        """
        check_output_place(self.output)
        for option, place in (("--warm", self.warm), ("--weights", self.weights)):
            check_apart({option: place, "the folder": self.states})
        # A report writes its results before the first state.
        if not self.results.exists() and self.states.exists():
            raise BadInputError(
                f"{self.states} was not written by a report, which would remove it", next_step="name another folder"
            )
