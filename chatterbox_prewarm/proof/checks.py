"""Judge what a proof process observed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import NotWarmError
from chatterbox_prewarm.families.numba_cache import COMPILE_TIMER
from chatterbox_prewarm.proof.probes import names_a_compiler

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold, whether it did, and what was seen."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The result of a proof, as it is written to a JSON file."""

    set_digest: str
    passed: bool
    checks: tuple[Check, ...]
    observed: dict[str, Any]

    def to_json(self) -> str:
        """The evidence as JSON text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def judge(observed: dict[str, Any], set_digest: str, *, apart: bool = True) -> Evidence:
    """Turn what a trial saw into checks; pure, so that each check can be shown to fail.

    Args:
        observed: what a trial reported.
        set_digest: of the state.
        apart: whether the process was to be set apart.
    """
    audio = observed["audio"]
    checks = [
        *(_isolation_checks(observed["isolation"]) if apart else []),
        *counter_checks(observed),
        Check(
            name="the audio is the bake's own",
            passed=audio["pcm_sha256"] == audio["expected_pcm_sha256"],
            seen=_audio_sentence(audio),
        ),
    ]
    return Evidence(
        set_digest=set_digest,
        passed=all(check.passed for check in checks),
        checks=tuple(checks),
        observed=observed,
    )


def _isolation_checks(isolation: dict[str, Any]) -> list[Check]:
    return [
        Check(name="not the super-user", passed=isolation["uid"] != 0, seen=f"uid {isolation['uid']}"),
        Check(
            name="no network interface but loopback",
            passed=set(isolation["interfaces"]) <= {"lo"},
            seen=", ".join(isolation["interfaces"]) or "none",
        ),
        Check(
            name="the state is read-only",
            passed=not isolation["state_writable"],
            seen="writable" if isolation["state_writable"] else "read-only",
        ),
    ]


def counter_checks(observed: dict[str, Any], *, left_out: frozenset[str] = frozenset()) -> list[Check]:
    """The checks that hold in any fresh process, set apart or not: everything hit, nothing missed or written.

    Args:
        observed: what a trial reported.
        left_out: families that were switched off at bake, whose misses are wanted there.
    """
    metrics = observed["metrics"]
    hits, misses = metrics["hits"], metrics["misses"]
    loaded = metrics["loaded"]
    checks = []
    for name in observed["families"]:
        # A family that a synthesis asks nothing of is put in place, and has to be complete, for when a voice is added.
        on_demand = name in loaded
        count, missed = (loaded if on_demand else hits).get(name, 0), misses.get(name, 0)
        checks.append(
            Check(
                name=f"{name} is in place" if on_demand else f"{name} was used",
                passed=count > 0 and not missed,
                seen=f"{count} {'loaded' if on_demand else 'hits'}, {missed} misses",
            )
        )
    others = {name: count for name, count in misses.items() if name not in {*observed["families"], *left_out} and count}
    # Where other processes share the network namespace, its counters are theirs too.
    alone = set(observed["isolation"]["interfaces"]) <= {"lo"}
    packets = {name: count for name, count in observed["packets"].items() if count and alone}
    network = [*observed["network"], *(f"{count} {name}" for name, count in packets.items())]
    checks.append(
        Check(
            name="no other miss", passed=not others, seen="; ".join([*map(str, others), *metrics["reasons"]]) or "none"
        )
    )
    passes = metrics["timers"].get(COMPILE_TIMER, 0.0)
    for name, events in (
        ("no network attempt", network),
        ("no compiler started", [event for event in observed["programs"] if names_a_compiler(event)]),
        # Also of functions that Numba is not asked to cache, which no counter of its cache sees.
        ("no pass of Numba's compiler", [f"{passes:.3f} s of them"] if passes and not left_out else []),
        ("no write into the state", observed["state_writes"]),
        # Whoever leaves a family out has it made anew in every start, and that writes.
        ("no write into a cache", [] if left_out else observed["cache_writes"]),
    ):
        checks.append(
            Check(name=name, passed=not events, seen=f"{len(events)}" + "".join(f"; {e}" for e in events[:5]))
        )
    return checks


def default_evidence(warm: Path) -> Path:
    """Where the evidence of a state lies unless another place is given: beside it, since it holds nothing unlisted."""
    return warm.with_name(f"{warm.name}.evidence.json")


def require_passed(
    evidence: Evidence, written: Path | str = "", *, again: str = "bake it again on this kind of machine"
) -> None:
    """Raise when a check failed.

    Args:
        evidence: of a proof.
        written: where all of it can be read, if anywhere.
        again: what to do about a failure.

    Raises:
        NotWarmError: naming every failed check and what was seen.
    """
    failed = [f"{check.name} (seen: {check.seen})" for check in evidence.checks if not check.passed]
    if failed or not (evidence.passed and evidence.checks):
        raise NotWarmError(
            f"the state is not warm: {'; '.join(failed) or 'nothing was checked'}",
            next_step=f"{again}; {written or 'a file that is named with `prove --evidence`'} has every detail",
        )


def _audio_sentence(audio: dict[str, Any]) -> str:
    if audio["pcm_sha256"] == audio["expected_pcm_sha256"]:
        return f"{audio['samples']} samples, identical"
    if audio["tokens_sha256"] == audio["expected_tokens_sha256"]:
        return "the speech tokens are the same, the samples differ: S3Gen or the watermark"
    return "the speech tokens differ: T3, its weights, or the voice"
