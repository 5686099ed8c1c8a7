"""Measure a bake: the time that each family costs and saves, and the times and the memory of the starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.registry import COMPILED, FAMILIES
from chatterbox_prewarm.state.manifest import Manifest, Measurements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatterbox_prewarm.state.manifest import FamilyEntry


def merge_logs(cold: Mapping[str, Any], compiled: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Add the time that the compile process spent on the compiled families to the log of the warm-up process."""
    if compiled is None:
        return cold
    names = {timer for name in COMPILED for timer in FAMILIES[name].timers}
    timers = {name: value for name, value in compiled["timers"].items() if name in names}
    return {
        "phases": [*cold["phases"], *(phase for phase in compiled["phases"] if phase["name"] in names)],
        "timers": {name: cold["timers"].get(name, 0.0) + timers.get(name, 0.0) for name in {*cold["timers"], *timers}},
    }


def measurements(manifest: Manifest, cold: Mapping[str, Any], warm: Mapping[str, Any]) -> Measurements:
    """Measure the two starts. A cold start compiles everything except packages, which only a bake makes."""
    compiling = sum(
        family.seconds_spent for family in manifest.families if family.name in COMPILED and family.name != "aot"
    )
    return Measurements(
        cold_seconds=round(cold["metrics"]["marks"]["attached"] + compiling, 3),
        ready_seconds=round(warm["metrics"]["marks"]["ready"], 3),
        resident_bytes=cold["resident_bytes"],
        device_bytes=cold["device_bytes"],
    )


def with_costs(manifest: Manifest, cold: Mapping[str, Any], warm: Mapping[str, Any]) -> Manifest:
    """Fill in what each family cost and saves, from the logs of a cold and a warm process."""

    def seconds(log: Mapping[str, Any], entry: FamilyEntry) -> float:
        names = FAMILIES[entry.name].timers
        phases = sum(phase["seconds"] for phase in log["phases"] if phase["name"] in names)
        return float(phases + sum(value for name, value in log["timers"].items() if name in names))

    return replace(
        manifest,
        families=tuple(
            replace(
                entry,
                seconds_spent=round(seconds(cold, entry), 3),
                seconds_saved=round(seconds(cold, entry) - seconds(warm, entry), 3),
            )
            for entry in manifest.families
        ),
    )
