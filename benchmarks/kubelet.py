"""Apply the kubelet's rules for probes to a server that runs without a kubelet.

The probes are read from a manifest, so the deployed probes are tested. The rules follow `pkg/kubelet/prober/worker.go`:

- Each probe has its own worker, which probes immediately and then once per period.
- The other probes begin when the startup probe has passed.
- A result counts when it has occurred as many times in a row as its threshold requires.
- A failed startup or liveness probe ends the container.

A `Watch` covers one life of a container and ends with it. For the next life, the caller begins a new watch.
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
EventKind = Literal["started", "ready", "not ready", "killed"]

KINDS: tuple[Kind, ...] = ("startup", "liveness", "readiness")
#: The kubelet reads at most this many bytes of a response body.
_BODY = 10 * 1024


@dataclass(frozen=True, kw_only=True)
class Probe:
    """An HTTP probe of a container, with the defaults of Kubernetes. Times are in seconds.

    Attributes:
        grace: grace period of the container when this probe fails; None means the pod's grace period.
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
    """A change that the kubelet would record.

    Attributes:
        at: seconds since the watch was created.
        kind: kind of the change.
        reason: last result of the probe as text.
        probe: probe that caused the change.
    """

    at: float
    kind: EventKind
    reason: str
    probe: Probe


def read_probes(container: Mapping[str, Any]) -> dict[Kind, Probe]:
    """Read the probes of a container from a manifest.

    Raises:
        BadInputError: a probe does not use HTTP, or names a port that the container does not have.
    """
    ports = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
    probes: dict[Kind, Probe] = {}
    for kind in KINDS:
        raw = container.get(f"{kind}Probe")
        if raw is None:
            continue
        if "httpGet" not in raw:
            raise BadInputError(f"the {kind} probe does not use HTTP", next_step="use httpGet")
        port = raw["httpGet"]["port"]
        if isinstance(port, str) and port not in ports:
            raise BadInputError(f"the {kind} probe uses the unknown port {port!r}", next_step="name a port like that")
        probes[kind] = Probe(
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
    return probes


class Threshold:
    """Counter of consecutive equal results of a probe.

    Attributes:
        result: whether the probe passes; None until a result has occurred often enough.
    """

    def __init__(self, probe: Probe) -> None:
        self.result: bool | None = {"startup": None, "liveness": True, "readiness": False}[probe.kind]
        self._probe = probe
        self._last: bool | None = None
        self._run = 0

    def take(self, passed: bool) -> bool:
        """Count a result; return whether it occurred often enough to count."""
        self._run = self._run + 1 if passed is self._last else 1
        self._last = passed
        needed = self._probe.success_threshold if passed else self._probe.failure_threshold
        if self._run < needed:
            return False
        self.result = passed
        return True


class Watch:
    """Context manager that applies the kubelet's rules to one life of a container.

    Args:
        probes: probes of the container, from `read_probes`.
        host: host on which the ports of the container are published.
        published: maps ports of the container to ports of that host; other ports are the same on both.

    Attributes:
        events: changes so far.
    """

    def __init__(
        self, probes: Mapping[Kind, Probe], *, host: str = "127.0.0.1", published: Mapping[int, int] | None = None
    ) -> None:
        self.events: list[Event] = []
        self._probes = probes
        self._host = host
        self._published = published or {}
        self._origin = time.monotonic()
        self._changed = threading.Condition()
        self._started = "startup" not in probes
        self._over = False
        self._threads = [
            threading.Thread(target=self._run, args=(probe,), name=f"{kind} probe", daemon=True)
            for kind, probe in probes.items()
        ]

    def __enter__(self) -> Watch:
        """Start the probes."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the probes and wait for those in flight."""
        self._end()
        for thread in self._threads:
            thread.join()

    @property
    def killed(self) -> bool:
        """True if the kubelet would have ended the container."""
        return any(event.kind == "killed" for event in self.events)

    @property
    def ready(self) -> bool:
        """True if the container receives requests."""
        changes = [event.kind for event in self.events if event.kind in {"ready", "not ready"}]
        return not self.killed and changes[-1:] == ["ready"]

    def wait_for(self, *kinds: EventKind, timeout: float, after: int = 0) -> Event | None:
        """Wait for the first event of the given kinds; return None after `timeout` seconds.

        Args:
            kinds: kinds of events.
            timeout: seconds to wait.
            after: number of earlier events to ignore.
        """

        def find() -> Event | None:
            return next((event for event in self.events[after:] if event.kind in kinds), None)

        with self._changed:
            return self._changed.wait_for(find, timeout)

    def elapsed(self) -> float:
        """Return the seconds since the watch was created, on the clock of its events."""
        return time.monotonic() - self._origin

    def _end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _note(self, kind: EventKind, reason: str, probe: Probe) -> None:
        with self._changed:
            self.events.append(Event(at=self.elapsed(), kind=kind, reason=reason, probe=probe))
            self._changed.notify_all()

    def _run(self, probe: Probe) -> None:
        threshold = Threshold(probe)
        for _ in self._ticks(probe):
            if self.elapsed() < probe.initial_delay:
                continue
            if self._started is (probe.kind == "startup"):
                continue
            before = threshold.result
            passed, reason = self._probe(probe)
            if self._over:
                return
            if threshold.take(passed) and passed is not before:
                self._apply(probe, passed, reason)

    def _apply(self, probe: Probe, passed: bool, reason: str) -> None:
        """Record that the result of a probe has changed."""
        if probe.kind == "readiness":
            self._note("ready" if passed else "not ready", reason, probe)
        elif not passed:
            self._note("killed", f"{probe.kind}: {reason}", probe)
            self._end()
        elif probe.kind == "startup":
            self._note("started", reason, probe)
            with self._changed:
                self._started = True
                self._changed.notify_all()

    def _ticks(self, probe: Probe) -> Iterator[None]:
        """Yield immediately and then once per period.

        If several ticks pass during a slow probe, only one of them is kept, as in Go's `time.Ticker`. The readiness
        probe runs as soon as the container has started, before its next tick.
        """
        begun = time.monotonic()
        ticks = 0
        awaits_start = probe.kind == "readiness" and not self._started
        while not self._over:
            yield
            missed = int((time.monotonic() - begun) / probe.period)
            if missed > ticks:  # the kept tick is due immediately
                ticks = missed
                continue
            ticks += 1
            pause = begun + ticks * probe.period - time.monotonic()
            if self._pause(pause, until_start=awaits_start):
                awaits_start = False
                ticks -= 1  # the regular tick is still due

    def _pause(self, seconds: float, *, until_start: bool) -> bool:
        """Wait until `seconds` are over, the watch ends or the container starts; return whether it has started."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or (until_start and self._started), max(0.0, seconds))
            return until_start and self._started

    def _probe(self, probe: Probe) -> tuple[bool, str]:
        """Probe once. A status from 200 to 399 within the timeout passes."""
        port = self._published.get(probe.port, probe.port)
        begun = time.monotonic()
        connection = http.client.HTTPConnection(self._host, port, timeout=probe.timeout)
        try:
            with contextlib.closing(connection):
                connection.request("GET", probe.path, headers={"User-Agent": "kube-probe", "Connection": "close"})
                response = connection.getresponse()
                response.read(_BODY)
        except (OSError, http.client.HTTPException) as error:
            return False, f"{probe.path}: {first_line(error)}"
        if time.monotonic() - begun > probe.timeout:
            return False, f"{probe.path}: no response within {probe.timeout:g} s"
        return 200 <= response.status < 400, f"{probe.path}: {response.status}"
