"""bench pods: what a pod of our manifests costs to start, warm and cold, and what an update under load loses.

There is no cluster in it: podman runs the pods, and the kubelet's rules are applied to the probes of the manifests
(`pod.py`, `kubelet.py`). The page cache is hot, the image is there.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pod import Pod
from chatterbox_prewarm.bench.clients import ask, mix
from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.bench.starts import machine
from chatterbox_prewarm.errors import EngineError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.system.paths import WARM
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.kubelet import Watch
    from chatterbox_prewarm.bench.clients import Answer, Target
    from chatterbox_prewarm.kube.documents import Document

#: Until a cluster's proxies have heard of a pod that comes or goes, in seconds.
_PROXY_LAG = 1.0
#: For how long clients ask before an update begins and after it, in seconds.
_BEFORE_AND_AFTER = 10.0
#: Seconds beyond what the startup probe allows, by which it has ended a start.
_MARGIN = 120.0


def run(
    documents: Sequence[Document],
    *,
    image: str | None,
    rounds: int,
    tokens: Sequence[int],
    clients: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Start a pod warm and cold in turn, then update one under load.

    Args:
        documents: manifests with one Deployment.
        image: in the place of theirs; podman has it.
        rounds: starts of each.
        tokens: the most speech tokens of a short, a medium and a long text, of the update's clients.
        clients: how many ask at a time during the update; what they wait for must fit into the pod's drain.
        say: called with a line for each step.

    Returns:
        machine and engine, for each start its seconds, hits and misses, and what became of the update's requests.

    Raises:
        EngineError: podman is missing, or could not run a pod.
        ModelError: a pod was not ready.
    """
    starts: dict[str, list[dict[str, Any]]] = {"warm": [], "cold": []}
    with tempfile.TemporaryDirectory(prefix="chatterbox-prewarm-bench-") as empty:
        Path(empty).chmod(0o755)
        for _ in range(rounds):
            for kind, found in starts.items():
                folders = {str(WARM): Path(empty)} if kind == "cold" else {}
                pod = Pod(documents, name=f"bench-{kind}", port=free_port(), image=image, folders=folders)
                found.append(_start(pod))
                say(f"{kind}: ready after {found[-1]['ready']:.1f} s, misses {found[-1]['misses'] or 'none'}")
    medians = {kind: statistics.median(start["ready"] for start in found) for kind, found in starts.items()}
    return {
        "machine": machine(),
        "podman": run_process(["podman", "version", "--format={{.Client.Version}}"]).stdout.strip(),
        "starts": starts,
        "ready": medians,
        "cold_to_warm": round(medians["cold"] / medians["warm"], 2),
        "update": update(documents, image=image, tokens=tokens, clients=clients, say=say),
    }


def _start(pod: Pod) -> dict[str, Any]:
    """Start a pod and remove it; seconds since the start of its container, and what the server says of its own."""
    with pod, pod.watch() as watched:
        ready = wait_ready(pod, watched)
        status = pod.target.status()
    return {
        "ready": round(ready, 2),
        "since_exec": status["marks"],
        "profile": status["profile"],
        "hits": status["hits"],
        "misses": status["misses"],
        "restarts": status["restarts"],
    }


def wait_ready(pod: Pod, watched: Watch) -> float:
    """Wait until the kubelet would call a pod ready; returns when that was, in seconds since its container's start.

    Raises:
        ModelError: it ended the pod instead, or neither came.
    """
    startup = pod.probes["startup"]
    event = watched.wait_for("ready", "killed", timeout=startup.period * startup.failure_threshold + _MARGIN)
    if event is None or event.what != "ready":
        raise ModelError(
            f"the pod was not ready: {event.why if event else 'nothing came'}; its log ends with {pod.log()[-1000:]}",
            next_step="see its log",
        )
    return pod.since_start() - watched.elapsed() + event.at


@dataclass
class _Endpoint:
    """A pod behind a service: from when on it gets connections, and until when."""

    target: Target
    since: float
    until: float = float("inf")


class Service:
    """Which pod a new connection goes to: of those that are ready, as proxies have heard, each in turn."""

    def __init__(self) -> None:
        self._endpoints: dict[int, _Endpoint] = {}
        self._turn = itertools.count()

    def add(self, pod: Pod) -> None:
        """A pod is ready."""
        self._endpoints[pod.port] = _Endpoint(pod.target, since=time.monotonic() + _PROXY_LAG)

    def remove(self, pod: Pod) -> None:
        """A pod is about to end."""
        self._endpoints[pod.port].until = time.monotonic() + _PROXY_LAG

    def pick(self) -> Target:
        """Where the next connection goes.

        Raises:
            EngineError: there is no pod that is ready.
        """
        now = time.monotonic()
        found = [endpoint.target for endpoint in self._endpoints.values() if endpoint.since <= now < endpoint.until]
        if not found:
            raise EngineError("no pod is ready", next_step="see what the update did before")
        return found[next(self._turn) % len(found)]


def update(
    documents: Sequence[Document],
    *,
    image: str | None,
    tokens: Sequence[int],
    clients: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Put a pod in the place of another while clients ask, in the order that `maxUnavailable: 0` prescribes.

    The new one starts; when it is ready, the old one is told to end, and drains. The arguments are those of `run`.

    Returns:
        how many answers there were of each outcome (`Answer.outcome`) and from how many pods at a time, how long the
        new pod took to be ready beside the old one and what it missed, and the old one's exit code.

    Raises:
        EngineError: podman could not run a pod.
        ModelError: a pod was not ready.
    """
    orders = mix(tokens, 4, voice=DEFAULT_VOICE)
    service, over = Service(), threading.Event()

    def client(number: int) -> list[Answer]:
        seen: list[Answer] = []
        while not over.is_set():
            order = orders[(number + len(seen)) % len(orders)]
            seen.append(ask(service.pick(), order, streamed=bool(len(seen) % 2)))
        return seen

    with contextlib.ExitStack() as stack:
        old = stack.enter_context(Pod(documents, name="bench-old", port=free_port(), image=image))
        with old.watch() as watched:
            wait_ready(old, watched)
            service.add(old)
            time.sleep(_PROXY_LAG)
            say(f"{clients} clients ask the old pod")
            pool = stack.enter_context(ThreadPoolExecutor(clients))
            stack.callback(over.set)
            asking = [pool.submit(client, number) for number in range(clients)]
            time.sleep(_BEFORE_AND_AFTER)
            new = stack.enter_context(Pod(documents, name="bench-new", port=free_port(), image=image))
            watched_new = stack.enter_context(new.watch())
            ready = wait_ready(new, watched_new)
        service.add(new)
        misses = new.target.status()["misses"]
        say(f"the new pod is ready after {ready:.1f} s; the old one is told to end")
        service.remove(old)
        began = time.monotonic()
        code = old.end()
        ended = time.monotonic() - began
        time.sleep(_BEFORE_AND_AFTER)
        over.set()
        answers = [answer for found in asking for answer in found.result()]
    outcomes = Counter(answer.outcome for answer in answers)
    return {
        "clients": clients,
        "answers": len(answers),
        **{name: outcomes[name] for name in ("sound", "refused", "lost", "failed", "cut")},
        "texts": sorted({answer.text for answer in answers if answer.text})[:10],
        "ready": round(ready, 2),
        "misses": misses,
        "old_exit_code": code,
        "old_ended_after": round(ended, 2),
        "killed": watched.killed or watched_new.killed,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{kind}: ready after {report['ready'][kind]:.1f} s "
        f"({', '.join(format(start['ready'], '.1f') for start in found)})"
        for kind, found in report["starts"].items()
    ]
    lines.append(f"cold over warm: {report['cold_to_warm']:.2f}")
    found = report["update"]
    lines.append(
        f"update under load: {found['answers']} requests, {found['answers'] - found['sound']} without their sound; "
        f"the old pod ended with {found['old_exit_code']} after {found['old_ended_after']:.1f} s"
    )
    return "\n".join(lines)
