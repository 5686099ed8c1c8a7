"""Prove: show that a warm state is really used, in a fresh process set apart from everything that baked it.

The process has another UID, host name, HOME and working directory, no network and a read-only state; it repeats a
synthesis of the bake's own. Every check below is a counter or a comparison of bytes; none is a time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.proof.checks import Evidence, judge
from chatterbox_prewarm.proof.proof_command import proof_command
from chatterbox_prewarm.state.compatibility import facts
from chatterbox_prewarm.state.selection import choose
from chatterbox_prewarm.system.json_subprocess import DEBUG, parse_report
from chatterbox_prewarm.system.paths import CACHE, make_cache
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from chatterbox_prewarm.state.manifest import Manifest
    from chatterbox_prewarm.state.selection import Choice

PROOF_UID = 12345
PROOF_HOSTNAME = "prewarm-proof"
PROOF_HOME = "/nonexistent"


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
        trial = proof_command(warm.resolve(), weights.resolve(), baked or cache)
        finished = run_process(
            _isolated(trial, warm.resolve(), cache, baked), env=_environment(scratch), cwd=Path("/"), timeout=timeout
        )
        return judge(parse_report(finished.stdout, finished.returncode), manifest.set_digest)
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
    finished = run_process(proof_command(chosen.path, weights, cache), timeout=timeout)
    return judge(parse_report(finished.stdout, finished.returncode), chosen.manifest.set_digest, apart=apart)


def _choose(warm: Path, weights: Path, cache: Path | None, device: str | None, state: str | None) -> Choice:
    """The state to prove; without a `cache` each has the one that it is bound to, since a proof makes that."""

    def known(manifest: Manifest) -> dict[str, str]:
        return facts(weights, cache or _baked_cache(manifest) or CACHE, device or manifest.reference.device)

    return choose(warm, known, device=device, name=state, strict=True)


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
