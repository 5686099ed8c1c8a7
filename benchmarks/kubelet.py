"""The kubelet's rules for probes, applied to a server without a kubelet: what would it do with a container, and when?

The probes are read out of a manifest, so what is tried is what is deployed. The rules are those of
`pkg/kubelet/prober/worker.go`: one worker for each probe, at once and then every period; no other probe before the
startup probe has passed; a result counts when it has come as often in a row as its threshold says; a startup or
liveness probe that has failed so ends the container, and the watch with it. A watch is for one life of a container:
whoever started it stops it, and begins another watch.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from chatterbox_prewarm.errors import BadInputError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Kind = Literal["startup", "liveness", "readiness"]
What = Literal["started", "ready", "not ready", "killed"]

KINDS: tuple[Kind, ...] = ("startup", "liveness", "readiness")
#: Of an answer's body, as much as the kubelet reads.
_BODY = 10 * 1024


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe of a container by HTTP; times in seconds, with the defaults of Kubernetes.

    Attributes:
        grace: that a container has to end when this probe has failed; None is the pod's grace period.
    """

    kind: Kind
    path: str
    port: int
    initial_delay: float = 0.0
    period: float = 10.0
    timeout: float = 1.0
    success_threshold: int = 1
    failure_threshold: int = 3
    grace: float | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """What the kubelet would note.

    Attributes:
        at: seconds since the watch was made.
        what: happened.
        why: the probe's last answer in words.
        probe: by which.
    """

    at: float
    what: What
    why: str
    probe: Probe


def read_probes(container: Mapping[str, Any]) -> dict[Kind, Probe]:
    """The probes of a container of a manifest.

    Raises:
        BadInputError: one is not by HTTP, or its port has no such name.
    """
    ports = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
    found: dict[Kind, Probe] = {}
    for kind in KINDS:
        raw = container.get(f"{kind}Probe")
        if raw is None:
            continue
        if "httpGet" not in raw:
            raise BadInputError(f"the {kind} probe is not by HTTP", next_step="give it an httpGet")
        port = raw["httpGet"]["port"]
        if isinstance(port, str) and port not in ports:
            raise BadInputError(f"the {kind} probe asks the port {port!r}, which no port is named", next_step="name it")
        found[kind] = Probe(
            kind=kind,
            path=raw["httpGet"].get("path", "/"),
            port=ports.get(port, port),
            initial_delay=raw.get("initialDelaySeconds", 0),
            period=raw.get("periodSeconds", 10),
            timeout=raw.get("timeoutSeconds", 1),
            success_threshold=raw.get("successThreshold", 1),
            failure_threshold=raw.get("failureThreshold", 3),
            grace=raw.get("terminationGracePeriodSeconds"),
        )
    return found


class Threshold:
    """Answers in a row, and the result that they make.

    Attributes:
        result: whether the probe passes, by what has come often enough; None while nothing has.
    """

    def __init__(self, probe: Probe) -> None:
        self.result: bool | None = {"startup": None, "liveness": True, "readiness": False}[probe.kind]
        self._probe = probe
        self._last: bool | None = None
        self._run = 0

    def take(self, passed: bool) -> bool:
        """Count an answer; returns whether it is the result now."""
        self._run = self._run + 1 if passed is self._last else 1
        self._last = passed
        needed = self._probe.success_threshold if passed else self._probe.failure_threshold
        if self._run < needed:
            return False
        self.result = passed
        return True


class Watch:
    """One life of a container under the kubelet's rules; a context manager that begins at once.

    Args:
        probes: of the container, as `read_probes` gives them.
        host: where its ports are reached.
        published: where a port of the container is reached on that host, where it is another one.

    Attributes:
        events: what happened so far.
    """

    def __init__(
        self, probes: Mapping[Kind, Probe], *, host: str = "127.0.0.1", published: Mapping[int, int] | None = None
    ) -> None:
        self.events: list[Event] = []
        self._probes = probes
        self._host = host
        self._published = published or {}
        self._origin = time.monotonic()
        self._news = threading.Condition()
        self._started = "startup" not in probes
        self._over = False
        self._threads = [
            threading.Thread(target=self._work, args=(probe,), name=f"{kind} probe", daemon=True)
            for kind, probe in probes.items()
        ]

    def __enter__(self) -> Watch:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ask no more; waits for answers that are under way."""
        self._end()
        for thread in self._threads:
            thread.join()

    @property
    def killed(self) -> bool:
        """Whether the kubelet would have ended the container."""
        return any(event.what == "killed" for event in self.events)

    @property
    def ready(self) -> bool:
        """Whether the container gets requests."""
        news = [event.what for event in self.events if event.what in {"ready", "not ready"}]
        return not self.killed and news[-1:] == ["ready"]

    def wait_for(self, *what: What, timeout: float, after: int = 0) -> Event | None:
        """The first event of these kinds; None if there is none within `timeout` seconds.

        Args:
            what: the kinds.
            timeout: seconds to wait at most.
            after: how many of the events so far do not count.
        """

        def find() -> Event | None:
            return next((event for event in self.events[after:] if event.what in what), None)

        with self._news:
            return self._news.wait_for(find, timeout)

    def elapsed(self) -> float:
        """Seconds since the watch was made, on the clock of its events."""
        return time.monotonic() - self._origin

    def _end(self) -> None:
        with self._news:
            self._over = True
            self._news.notify_all()

    def _note(self, what: What, why: str, probe: Probe) -> None:
        with self._news:
            self.events.append(Event(at=self.elapsed(), what=what, why=why, probe=probe))
            self._news.notify_all()

    def _work(self, probe: Probe) -> None:
        threshold = Threshold(probe)
        for _ in self._ticks(probe):
            if self.elapsed() < probe.initial_delay:
                continue
            if self._started is (probe.kind == "startup"):
                continue
            before = threshold.result
            passed, why = self._ask(probe)
            if self._over:
                return
            if threshold.take(passed) and passed is not before:
                self._act(probe, passed, why)

    def _act(self, probe: Probe, passed: bool, why: str) -> None:
        """A probe has another result than before."""
        if probe.kind == "readiness":
            self._note("ready" if passed else "not ready", why, probe)
        elif not passed:
            self._note("killed", f"{probe.kind}: {why}", probe)
            self._end()
        elif probe.kind == "startup":
            self._note("started", why, probe)
            with self._news:
                self._started = True
                self._news.notify_all()

    def _ticks(self, probe: Probe) -> Iterator[None]:
        """At once, then every period; of ticks that pass during a long answer one is kept.

        Readiness is asked as soon as the container has started, and not at its next tick.
        """
        begun = time.monotonic()
        ticks = 0
        waits_for_start = probe.kind == "readiness" and not self._started
        while not self._over:
            yield
            missed = int((time.monotonic() - begun) / probe.period)
            if missed > ticks:  # the one that was kept
                ticks = missed
                continue
            ticks += 1
            pause = begun + ticks * probe.period - time.monotonic()
            if self._pause(pause, until_start=waits_for_start):
                waits_for_start = False
                ticks -= 1  # the one that was waited for is still to come

    def _pause(self, seconds: float, *, until_start: bool) -> bool:
        """Wait, but not beyond the watch's end or the container's start; returns whether it was the start."""
        with self._news:
            self._news.wait_for(lambda: self._over or (until_start and self._started), max(0.0, seconds))
            return until_start and self._started

    def _ask(self, probe: Probe) -> tuple[bool, str]:
        """Ask once: passed is any status from 200 to 399 whose answer is there in time."""
        port = self._published.get(probe.port, probe.port)
        begun = time.monotonic()
        connection = http.client.HTTPConnection(self._host, port, timeout=probe.timeout)
        try:
            with contextlib.closing(connection):
                connection.request("GET", probe.path, headers={"User-Agent": "kube-probe", "Connection": "close"})
                answer = connection.getresponse()
                answer.read(_BODY)
        except (OSError, http.client.HTTPException) as error:
            return False, f"{probe.path}: {first_line(error)}"
        if time.monotonic() - begun > probe.timeout:
            return False, f"{probe.path}: no answer within {probe.timeout:g} s"
        return 200 <= answer.status < 400, f"{probe.path}: {answer.status}"
