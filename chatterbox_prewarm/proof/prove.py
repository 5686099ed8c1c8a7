"""Prove that a warm state is used, in a fresh process that is isolated from everything that baked it.

The process has another UID, host name, HOME and working directory, no network, and a read-only state. It repeats a
synthesis of the bake, or converts speech.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.proof.checks import judge
from chatterbox_prewarm.state.compatibility import machine_facts
from chatterbox_prewarm.state.selection import Request, select_state
from chatterbox_prewarm.system.json_subprocess import DEBUG, parse_report
from chatterbox_prewarm.system.paths import CACHE, make_cache
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from chatterbox_prewarm.proof.checks import Evidence
    from chatterbox_prewarm.state.state import State

PROOF_UID = 12345
PROOF_HOSTNAME = "prewarm-proof"
PROOF_HOME = "/nonexistent"


@dataclass(frozen=True, kw_only=True)
class ProofOptions:
    """The options of a proof.

    Attributes:
        warm: the directory of a state, or of several.
        weights: the directory of the checkpoint.
        device: the device for which one of several states is selected; by default the device of each state.
        name: the state to prove; by default the one that a start would use here.
        converts: prove a start that converts speech instead of one that speaks texts.
        timeout: seconds that the process may run.
    """

    warm: Path
    weights: Path
    device: str | None = None
    name: str | None = None
    converts: bool = False
    timeout: float = 900.0


def prove(options: ProofOptions) -> Evidence:
    """Run the proof process in new user, network, host name and mount namespaces, and judge its report.

    Raises:
        EngineError: this system does not allow the namespaces.
        PrewarmError: the state cannot be used at all; the kind of the error says why.
    """
    state = _select(options, None)
    warm = state.path.resolve()
    scratch = Path(tempfile.mkdtemp(prefix="chatterbox-prewarm-proof-"))
    try:
        check_namespaces(warm)
        cache = scratch / "cache"
        cache.mkdir()
        baked_cache = _baked_cache(state)
        if baked_cache is not None:
            make_cache(baked_cache)  # the mount point
        command = proof_command(warm, options.weights.resolve(), baked_cache or cache, converts=options.converts)
        finished = run_process(
            _isolated(command, warm, cache, baked_cache),
            env=_environment(scratch),
            cwd=Path("/"),
            timeout=options.timeout,
        )
        return judge(parse_report(finished.stdout, finished.returncode), state.manifest.set_digest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prove_here(options: ProofOptions, cache: Path, *, isolated: bool = True) -> Evidence:
    """Run the proof process as a child of this process, which is already isolated, for example in a container.

    Args:
        options: of the proof.
        cache: the cache directory.
        isolated: False for a process that is not isolated, such as one that must reach a registry. Then the evidence
            has no check of the isolation.
    """
    state = _select(options, cache)
    command = proof_command(state.path, options.weights, cache, converts=options.converts)
    finished = run_process(command, timeout=options.timeout)
    return judge(parse_report(finished.stdout, finished.returncode), state.manifest.set_digest, isolated=isolated)


def proof_command(warm: Path, weights: Path, cache: Path, *, converts: bool = False) -> list[str]:
    """Return the command that runs the proof process in a fresh interpreter."""
    arguments = {"warm": str(warm), "weights": str(weights), "cache": str(cache), "converts": converts}
    return [sys.executable, "-m", "chatterbox_prewarm.proof.proof_process", json.dumps(arguments)]


def _select(options: ProofOptions, cache: Path | None) -> State:
    """Select the state to prove. Without a `cache`, each state gets the cache path that it was baked at."""

    def facts(state: State) -> dict[str, str]:
        device = options.device or state.manifest.reference.device
        return machine_facts(options.weights, cache or _baked_cache(state) or CACHE, device)

    request = Request(device=options.device, name=options.name, strict=True)
    return select_state(options.warm, facts, request).state


def _environment(scratch: Path) -> dict[str, str]:
    """Return the environment of a container, the path of this package, and the settings that change no result.

    OMP_WAIT_POLICY=passive keeps idle threads from spinning. On a busy machine, spinning slows a proof down threefold.
    """
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": PROOF_HOME,
        "TMPDIR": str(scratch),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        **{name: os.environ[name] for name in (DEBUG, "OMP_WAIT_POLICY") if name in os.environ},
    }


def check_namespaces(warm: Path) -> None:
    """Check that this system allows the namespaces, so that a failure of the proof process has another cause.

    Args:
        warm: a folder to mount.

    Raises:
        EngineError: it does not.
    """
    status = run_process(_isolated(["true"], warm)).returncode
    if status != 0:
        raise EngineError(
            f"a process cannot be isolated here: unshare or mount ended with status {status}",
            next_step="see its message above and allow user namespaces. Or prove in a container: "
            "chatterbox-prewarm prove --image IMAGE",
        )


def _baked_cache(state: State) -> Path | None:
    """Return the cache path that the state was baked at, if one of its families depends on the path."""
    paths = {Path(entry.requires["cache"]) for entry in state.manifest.families if "cache" in entry.requires}
    return next(iter(paths), None)


def _isolated(command: list[str], warm: Path, cache: Path | None = None, mount_point: Path | None = None) -> list[str]:
    """Wrap a command with util-linux's `unshare`, twice: as the namespace's root to set it up, then as another user.

    With a `mount_point`, the process sees the folder `cache` at that path.

    A user namespace changes the UID that the process sees and removes its capabilities, for root and for other users,
    while the process can still reach files that only the caller may read.
    """
    state = shlex.quote(str(warm))
    mount = f"mount --bind {shlex.quote(str(cache))} {shlex.quote(str(mount_point))} && " if mount_point else ""
    setup = (
        f"{mount}hostname {PROOF_HOSTNAME} && mount --bind {state} {state} && mount -o remount,bind,ro {state} && "
        f"exec unshare --user --map-user={PROOF_UID} --map-group={PROOF_UID} -- {shlex.join(command)}"
    )
    return ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount", "--", "sh", "-ec", setup]
