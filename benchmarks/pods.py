"""`benchmarks pods`: measure warm and cold starts of a pod of our manifests, and an update under load.

It needs no cluster: podman runs the pods, and the kubelet's rules are applied to the probes of the manifests (`pod.py`,
`kubelet.py`). The page cache is hot and the image is present.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pod import Pod
from chatterbox_prewarm.bench.clients import make_requests, request_speech
from chatterbox_prewarm.bench.server import free_port
from chatterbox_prewarm.bench.starts import SCRATCH, machine
from chatterbox_prewarm.errors import EngineError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.system.paths import WARM
from chatterbox_prewarm.system.process import run as run_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.kubelet import Watch
    from chatterbox_prewarm.bench.clients import Answer, Target
    from chatterbox_prewarm.kube.documents import Document

#: Seconds until the proxies of a cluster learn that a pod was added or removed.
_PROXY_LAG = 1.0
#: Seconds of load before an update begins and after it has ended.
_BEFORE_AND_AFTER = 10.0
#: Seconds after the limit of the startup probe within which the probe must have ended the start.
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
        image: image to run instead of theirs. Podman must have it.
        rounds: starts of each kind.
        tokens: limits of speech tokens for a short, a medium and a long text during the update.
        clients: concurrent clients during the update. Their requests must finish within the drain time of the pod.
        say: called with one line for each step.

    Returns:
        machine and engine, seconds, hits and misses of each start, and the outcomes of the requests during the update.

    Raises:
        EngineError: podman is missing or could not run a pod.
        ModelError: a pod was not ready.
    """
    starts: dict[str, list[dict[str, Any]]] = {"warm": [], "cold": []}
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as empty:
        Path(empty).chmod(0o755)
        for _ in range(rounds):
            for kind, results in starts.items():
                folders = {str(WARM): Path(empty)} if kind == "cold" else {}
                pod = Pod(documents, name=f"bench-{kind}", port=free_port(), image=image, folders=folders)
                results.append(_start(pod))
                say(f"{kind}: ready after {results[-1]['ready']:.1f} s, misses {results[-1]['misses'] or 'none'}")
    medians = {kind: statistics.median(start["ready"] for start in results) for kind, results in starts.items()}
    return {
        "machine": machine(),
        "podman": run_process(["podman", "version", "--format={{.Client.Version}}"]).stdout.strip(),
        "starts": starts,
        "ready": medians,
        "cold_to_warm": round(medians["cold"] / medians["warm"], 2),
        "update": update(documents, image=image, tokens=tokens, clients=clients, say=say),
    }


def _start(pod: Pod) -> dict[str, Any]:
    """Start and remove a pod; return the seconds from the start of its container, and the figures of the server."""
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
    """Wait until the kubelet would call a pod ready; return the seconds from the start of its container.

    Raises:
        ModelError: a probe ended the pod, or the pod was not ready in time.
    """
    startup = pod.probes["startup"]
    event = watched.wait_for("ready", "killed", timeout=startup.period * startup.failure_threshold + _MARGIN)
    if event is None or event.kind != "ready":
        raise ModelError(
            f"the pod was not ready: {event.reason if event else 'timeout'}; its log ends with {pod.log()[-1000:]}",
            next_step="see its log",
        )
    return pod.since_start() - watched.elapsed() + event.at


class Service:
    """Round-robin over the ready pods. Like a proxy of a cluster, it learns about a change after `_PROXY_LAG`."""

    def __init__(self) -> None:
        self._since: dict[Target, float] = {}
        self._until: dict[Target, float] = {}
        self._turn = itertools.count()

    def add(self, pod: Pod) -> None:
        """Add a pod that is ready."""
        self._since[pod.target] = time.monotonic() + _PROXY_LAG

    def remove(self, pod: Pod) -> None:
        """Remove a pod that is about to end."""
        self._until[pod.target] = time.monotonic() + _PROXY_LAG

    def pick(self) -> Target:
        """Choose the pod for the next connection.

        Raises:
            EngineError: no pod is ready.
        """
        now = time.monotonic()
        targets = [
            target for target, since in self._since.items() if since <= now < self._until.get(target, float("inf"))
        ]
        if not targets:
            raise EngineError("no pod is ready", next_step="see the earlier steps of the update above")
        return targets[next(self._turn) % len(targets)]


def update(
    documents: Sequence[Document],
    *,
    image: str | None,
    tokens: Sequence[int],
    clients: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Replace a pod under load in the order of `maxUnavailable: 0`. The arguments are those of `run`.

    The new pod starts. When it is ready, the old pod is deleted, and drains.

    Returns:
        the number of answers by outcome (`Answer.outcome`), the seconds until the new pod was ready while the old one
        served, the misses of the new pod, and the exit code of the old one.

    Raises:
        EngineError: podman could not run a pod.
        ModelError: a pod was not ready.
    """
    bodies = make_requests(tokens, 4, voice=DEFAULT_VOICE)
    service, over = Service(), threading.Event()
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(Pod(documents, name="bench-old", port=free_port(), image=image))
        with old.watch() as watched:
            wait_ready(old, watched)
            service.add(old)
            time.sleep(_PROXY_LAG)
            say(f"{clients} clients send requests to the old pod")
            pool = stack.enter_context(ThreadPoolExecutor(clients))
            stack.callback(over.set)
            clients_running = [pool.submit(_send_requests, service, bodies, number, over) for number in range(clients)]
            time.sleep(_BEFORE_AND_AFTER)
            new = stack.enter_context(Pod(documents, name="bench-new", port=free_port(), image=image))
            watched_new = stack.enter_context(new.watch())
            ready = wait_ready(new, watched_new)
        service.add(new)
        misses = new.target.status()["misses"]
        say(f"the new pod is ready after {ready:.1f} s; the old one is deleted")
        service.remove(old)
        began = time.monotonic()
        code = old.end()
        ended = time.monotonic() - began
        time.sleep(_BEFORE_AND_AFTER)
        over.set()
        answers = [answer for future in clients_running for answer in future.result()]
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


def _send_requests(
    service: Service, bodies: Sequence[dict[str, Any]], first: int, over: threading.Event
) -> list[Answer]:
    """Send the requests in turn, beginning with number `first`, until `over` is set. Every second one is streamed."""
    answers: list[Answer] = []
    while not over.is_set():
        body = bodies[(first + len(answers)) % len(bodies)]
        answers.append(request_speech(service.pick(), body, streamed=bool(len(answers) % 2)))
    return answers


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    lines = [
        f"{kind}: ready after {report['ready'][kind]:.1f} s "
        f"({', '.join(format(start['ready'], '.1f') for start in results)})"
        for kind, results in report["starts"].items()
    ]
    lines.append(f"cold / warm: {report['cold_to_warm']:.2f}")
    update = report["update"]
    lines.append(
        f"update under load: {update['answers']} requests, {update['answers'] - update['sound']} without audio; "
        f"the old pod ended with {update['old_exit_code']} after {update['old_ended_after']:.1f} s"
    )
    return "\n".join(lines)
