"""Judge the observations of a proof process. Every check is a counter or a comparison of bytes, never a time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, NotWarmError
from chatterbox_prewarm.families.numba_cache import COMPILE_TIMER
from chatterbox_prewarm.proof.probes import names_a_compiler
from chatterbox_prewarm.state.places import check_output_place
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from pathlib import Path


#: How far the difference between compiled code and eager mode must be below the audio. On a CPU it is 50 dB and more.
_LEAST_DECIBELS = 40.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """A condition, whether it holds, and the observation."""

    name: str
    passed: bool
    seen: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The result of a proof. It is written to a JSON file."""

    set_digest: str
    passed: bool
    checks: tuple[Check, ...]
    observed: dict[str, Any]

    def to_document(self) -> dict[str, Any]:
        """Return the evidence as a JSON object."""
        return asdict(self)

    def to_json(self) -> str:
        """Return the evidence as JSON text."""
        return json.dumps(self.to_document(), indent=1, sort_keys=True) + "\n"


def judge(observed: dict[str, Any], set_digest: str, *, isolated: bool = True) -> Evidence:
    """Turn the observations of a proof process into checks. This function is pure, so a test can make each check fail.

    Args:
        observed: the report of the proof process.
        set_digest: of the state.
        isolated: whether the process had to be isolated.
    """
    checks = (
        *(_isolation_checks(observed["isolation"]) if isolated else ()),
        *counter_checks(observed),
        audio_check(observed),
    )
    return Evidence(
        set_digest=set_digest,
        passed=all(check.passed for check in checks),
        checks=checks,
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
    """Check that everything was a hit and that nothing was missed, compiled or written.

    Args:
        observed: the report of the proof process.
        left_out: families that were left out at bake. Their misses are expected.
    """
    metrics = observed["metrics"]
    checks = [_family_check(name, metrics) for name in observed["families"]]
    expected = {*observed["families"], *left_out}
    other_misses = [name for name, count in metrics["misses"].items() if name not in expected and count]
    seen = "; ".join([*other_misses, *metrics["reasons"]]) or "none"
    checks.append(Check(name="no other miss", passed=not other_misses, seen=seen))
    numba_seconds = metrics["timers"].get(COMPILE_TIMER, 0.0)
    for name, events in (
        ("no network attempt", _network_events(observed)),
        ("no compiler started", [event for event in observed["programs"] if names_a_compiler(event)]),
        # This also covers functions that Numba is not asked to cache, which the counters of its cache miss.
        ("no pass of Numba's compiler", [f"{numba_seconds:.3f} s"] if numba_seconds and not left_out else []),
        ("no write into the state", observed["state_writes"]),
        # A start compiles the families that were left out at bake, and that writes into the cache.
        ("no write into a cache", [] if left_out else observed["cache_writes"]),
    ):
        seen = f"{len(events)}" + "".join(f"; {event}" for event in events[:5])
        checks.append(Check(name=name, passed=not events, seen=seen))
    return checks


def _family_check(name: str, metrics: dict[str, Any]) -> Check:
    """Check that a family was used. One that only adding a voice uses must be loaded completely."""
    on_demand = name in metrics["loaded"]
    count = metrics["loaded" if on_demand else "hits"].get(name, 0)
    misses = metrics["misses"].get(name, 0)
    return Check(
        name=f"{name} is in place" if on_demand else f"{name} was used",
        passed=count > 0 and not misses,
        seen=f"{count} {'loaded' if on_demand else 'hits'}, {misses} misses",
    )


def _network_events(observed: dict[str, Any]) -> list[str]:
    # In a network namespace that other processes share, the packet counters are theirs too.
    private = set(observed["isolation"]["interfaces"]) <= {"lo"}
    packets = [f"{count} {name}" for name, count in observed["packets"].items() if count and private]
    return [*observed["network"], *packets]


def audio_check(observed: dict[str, Any]) -> Check:
    """Check that the audio is identical to the audio of the bake, or similar to eager mode if the bake has no audio."""
    audio = observed["audio"]
    if audio.get("decibels") is not None:
        same = audio["tokens_sha256"] == audio["expected_tokens_sha256"]
        return Check(
            name="the audio is like that of eager mode",
            passed=same and audio["decibels"] >= _LEAST_DECIBELS,
            seen=f"{'the same' if same else 'other'} speech tokens, the difference is {audio['decibels']:.0f} dB below",
        )
    identical = audio["pcm_sha256"] == audio["expected_pcm_sha256"]
    if identical:
        seen = f"{audio['samples']} samples, identical"
    elif audio["tokens_sha256"] == audio["expected_tokens_sha256"]:
        seen = "the speech tokens are the same, but the samples differ: look at S3Gen or the watermark"
    else:
        seen = "the speech tokens differ: look at T3, its weights, or the voice"
    return Check(name="the audio is identical to the bake", passed=identical, seen=seen)


def default_evidence(warm: Path) -> Path:
    """Return the default path of a state's evidence: next to the state, which may hold no unlisted file."""
    return warm.with_name(f"{warm.name}.evidence.json")


def remove_older_evidence(path: Path) -> None:
    """Remove the evidence of an older proof, which must not be mistaken for that of the next one.

    Raises:
        BadInputError: the path is inside a state or a checkpoint, or has a file that is not evidence.
        OSError: the file cannot be read or removed.
    """
    check_output_place(path)
    try:
        raw = json.loads(read_regular(path))
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or "passed" not in raw:
        raise BadInputError(
            f"{path} is not the evidence of a proof, and would be removed", next_step="name another path"
        )
    path.unlink()


def require_passed(
    evidence: Evidence, details: Path | str = "", *, rebake_hint: str = "bake it again on this kind of machine"
) -> None:
    """Raise an error if a check failed.

    Args:
        evidence: the result of a proof.
        details: where the user can read all of it.
        rebake_hint: advice for the user after a failure.

    Raises:
        NotWarmError: naming every failed check with its observation.
    """
    failed = [f"{check.name} (seen: {check.seen})" for check in evidence.checks if not check.passed]
    if failed or not (evidence.passed and evidence.checks):
        raise NotWarmError(
            f"the state is not warm: {'; '.join(failed) or 'nothing was checked'}",
            next_step=f"{rebake_hint}; see every detail in {details or 'the file of `prove --evidence FILE`'}",
        )
