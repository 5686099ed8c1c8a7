"""Prove: show that a warm state is really used, in a fresh process set apart from everything that baked it.

The process has another UID, host name, HOME and working directory, no network and a read-only state; it repeats a
synthesis of the bake's own. Every check below is a counter or a comparison of bytes; none is a time.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.child import DEBUG, rebuild
from chatterbox_prewarm.choice import choose
from chatterbox_prewarm.errors import EngineError, ModelError, NotWarmError
from chatterbox_prewarm.families.numba_cache import COMPILE_TIMER
from chatterbox_prewarm.fit import facts
from chatterbox_prewarm.places import CACHE, make_cache
from chatterbox_prewarm.probes import names_a_compiler
from chatterbox_prewarm.process import run as run_process

if TYPE_CHECKING:
    from chatterbox_prewarm.choice import Choice
    from chatterbox_prewarm.manifest import Manifest

PROOF_UID = 12345
PROOF_HOSTNAME = "prewarm-proof"
PROOF_HOME = "/nonexistent"


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


def prove(
    warm: Path, weights: Path, *, device: str | None = None, state: str | None = None, timeout: float = 900.0
) -> Evidence:
    """Run the trial in a new user, network, host-name and mount namespace, and judge what it saw.

    Args:
        warm: a state, or a folder of states.
        weights: the checkpoint's directory.
        device: of the start that a state of a folder is chosen for; each state's own by default.
        state: the one to prove of a folder; by default the one that a start here would take.
        timeout: of the trial, in seconds.

    Raises:
        EngineError: this system does not let the process be set apart.
        PrewarmError: the state cannot be used at all; the code says why.
    """
    chosen = _choose(warm, weights, None, device, state)
    manifest, warm = chosen.manifest, chosen.path
    scratch = Path(tempfile.mkdtemp(prefix="chatterbox-prewarm-proof-"))
    try:
        _check_namespaces(warm.resolve())
        cache = scratch / "cache"
        cache.mkdir()
        baked = _baked_cache(manifest)
        if baked is not None:
            make_cache(baked)  # a place to mount on
        trial = trial_command(warm.resolve(), weights.resolve(), baked or cache)
        finished = run_process(
            _isolated(trial, warm.resolve(), cache, baked), env=_environment(scratch), cwd=Path("/"), timeout=timeout
        )
        return judge(parse_trial(finished.stdout, finished.returncode), manifest.set_digest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prove_here(
    warm: Path,
    weights: Path,
    cache: Path,
    *,
    device: str | None = None,
    state: str | None = None,
    apart: bool = True,
    timeout: float = 900.0,
) -> Evidence:
    """Run the trial in a child of this process, which is itself set apart, as in a container run for this purpose.

    Args:
        warm: a state, or a folder of states.
        weights: the checkpoint's directory.
        cache: the cache directory.
        device: as for `prove`.
        state: as for `prove`.
        timeout: of the trial, in seconds.
        apart: False for a process that is not, such as one that must reach a registry: then nothing is asked of how it
            is set apart, and the evidence has no check of it.
    """
    chosen = _choose(warm, weights, cache, device, state)
    finished = run_process(trial_command(chosen.path, weights, cache), timeout=timeout)
    return judge(parse_trial(finished.stdout, finished.returncode), chosen.manifest.set_digest, apart=apart)


def _choose(warm: Path, weights: Path, cache: Path | None, device: str | None, state: str | None) -> Choice:
    """The state to prove; without a `cache` each has the one that it is bound to, since a proof makes that."""

    def known(manifest: Manifest) -> dict[str, str]:
        return facts(weights, cache or _baked_cache(manifest) or CACHE, device or manifest.reference.device)

    return choose(warm, known, device=device, name=state, strict=True)


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


def parse_trial(output: str, status: int) -> dict[str, Any]:
    """Read what a worker process reported, raising its error here.

    Args:
        output: its standard output, one JSON document.
        status: its exit status.

    Raises:
        PrewarmError: of the kind that the process reported.
        ModelError: it ended without a report.
    """
    if status != 0 or not output:
        raise ModelError(
            f"the process ended with status {status} before it could report", next_step="see its output above"
        )
    try:
        observed: dict[str, Any] = json.loads(output)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"the process reported something that is not JSON: {error}", next_step="see its output above"
        ) from error
    if "error" in observed:
        raise rebuild(observed)
    return observed


def trial_command(warm: Path, weights: Path, cache: Path) -> list[str]:
    """The command that runs `trial` in a fresh interpreter."""
    arguments = json.dumps({"warm": str(warm), "weights": str(weights), "cache": str(cache)})
    return [sys.executable, "-m", "chatterbox_prewarm.trial", arguments]


def _environment(scratch: Path) -> dict[str, str]:
    """Next to nothing of this process's environment: what a container would give, and where this package lies."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": PROOF_HOME,
        "TMPDIR": str(scratch),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        **{name: os.environ[name] for name in (DEBUG,) if name in os.environ},
    }


def _check_namespaces(warm: Path) -> None:
    """Find out whether this system lets a process be set apart, apart from whether the trial then succeeds.

    Raises:
        EngineError: it does not.
    """
    status = run_process(_isolated(["true"], warm)).returncode
    if status != 0:
        raise EngineError(
            f"a process cannot be set apart here: unshare or mount ended with status {status}",
            next_step="see its message above; user namespaces must be allowed. Or prove in a container: "
            "chatterbox-prewarm prove --image IMAGE",
        )


def _baked_cache(manifest: Manifest) -> Path | None:
    """The one cache path that a family of the state can be used at, if any is bound to one."""
    paths = {Path(entry.requires["cache"]) for entry in manifest.families if "cache" in entry.requires}
    return next(iter(paths), None)


def _isolated(command: list[str], warm: Path, cache: Path | None = None, place: Path | None = None) -> list[str]:
    """Wrap a command with util-linux's `unshare`, twice: as the namespace's root to set up, then as a foreign user.

    When a `place` is given, the process sees the folder `cache` there.

    A user namespace changes the UID that the process sees and takes all its capabilities, for root and for ordinary
    users alike, while it can still reach files that only the caller may read.
    """
    state = shlex.quote(str(warm))
    mount = f"mount --bind {shlex.quote(str(cache))} {shlex.quote(str(place))} && " if place else ""
    setup = (
        f"{mount}hostname {PROOF_HOSTNAME} && mount --bind {state} {state} && mount -o remount,bind,ro {state} && "
        f"exec unshare --user --map-user={PROOF_UID} --map-group={PROOF_UID} -- {shlex.join(command)}"
    )
    return ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount", "--", "sh", "-ec", setup]
