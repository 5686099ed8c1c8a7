"""The kubelet's rules, against a server on loopback that answers as it is told; times are scaled, the rules are not."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from benchmarks.kubelet import Probe, Threshold, Watch, read_probes
from chatterbox_prewarm.errors import BadInputError
from tests.helpers.manifests import K8S, kustomize, pods

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kubelet import Kind

#: A second of a manifest is so long here.
SCALE = 0.05


class App:
    """A server with three health routes, each with a status or with seconds that it takes."""

    def __init__(self) -> None:
        self.status = {"/startupz": 503, "/livez": 200, "/readyz": 503}
        self.delay = dict.fromkeys(self.status, 0.0)
        self.asked: list[str] = []
        self.port = 0


@pytest.fixture
def app() -> Iterator[App]:
    found = App()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            time.sleep(found.delay[self.path])
            with contextlib.suppress(ConnectionError):
                self.send_response(found.status[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def probes(**changes: dict[str, float]) -> dict[Kind, Probe]:
    """Those of the base, a second being `SCALE`; a short startup budget unless it is changed."""
    pod = next(pod for _, pod in pods(kustomize(K8S / "base")))
    found = read_probes(pod["containers"][0])
    scaled = {
        kind: replace(probe, period=probe.period * SCALE, timeout=probe.timeout * SCALE)
        for kind, probe in found.items()
    }
    scaled["startup"] = replace(scaled["startup"], failure_threshold=100)
    return {kind: replace(probe, **changes.get(kind, {})) for kind, probe in scaled.items()}  # type: ignore[arg-type]


def watch(app: App, **changes: dict[str, float]) -> Watch:
    return Watch(probes(**changes), published={8000: app.port})


def test_the_probes_of_the_base_are_read_as_they_stand_there() -> None:
    pod = next(pod for _, pod in pods(kustomize(K8S / "base")))
    found = read_probes(pod["containers"][0])
    assert found["startup"] == Probe(kind="startup", path="/startupz", port=8000, period=1, failure_threshold=360)
    assert found["liveness"] == Probe(kind="liveness", path="/livez", port=8000, period=5, timeout=5, grace=20)
    assert found["readiness"] == Probe(kind="readiness", path="/readyz", port=8000, period=1)
    assert (found["readiness"].failure_threshold, found["readiness"].timeout) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "thresholds", "answers", "results"),
    [
        ("readiness", (1, 3), "+--+---+", [True, True, True, True, True, True, False, True]),
        ("liveness", (1, 3), "--+---", [True, True, True, True, True, False]),
        ("startup", (1, 3), "--+", [None, None, True]),
        ("readiness", (2, 1), "+-++", [False, False, False, True]),
    ],
)
def test_an_answer_counts_when_it_has_come_often_enough_in_a_row(
    kind: Kind, thresholds: tuple[int, int], answers: str, results: list[bool | None]
) -> None:
    successes, failures = thresholds
    found = Threshold(Probe(kind=kind, path="/", port=1, success_threshold=successes, failure_threshold=failures))
    seen = []
    for answer in answers:
        found.take(answer == "+")
        seen.append(found.result)
    assert seen == results


def test_a_warm_start_is_ready_at_once(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        ready = watched.wait_for("ready", timeout=2)
        assert ready is not None
        assert watched.ready
    assert [event.what for event in watched.events] == ["started", "ready"]
    assert ready.at < 10 * SCALE, "readiness is asked as soon as the container has started"


def test_no_other_probe_is_asked_before_the_start_is_over(app: App) -> None:
    app.status["/livez"] = 500
    with watch(app) as watched:
        time.sleep(20 * SCALE)
        assert set(app.asked) == {"/startupz"}
        app.status.update({"/startupz": 200, "/livez": 200, "/readyz": 200})
        assert watched.wait_for("ready", timeout=2) is not None
        asked = app.asked.count("/startupz")
        time.sleep(5 * SCALE)
        assert app.asked.count("/startupz") == asked, "and no more once it is"
    assert not watched.killed


def test_a_start_within_its_budget_is_slow_and_one_beyond_is_ended(app: App) -> None:
    with watch(app) as watched:
        time.sleep(30 * SCALE)
        assert watched.events == []
        app.status["/startupz"] = 200
        assert watched.wait_for("started", timeout=2) is not None
    app.status["/startupz"] = 503
    with watch(app, startup={"failure_threshold": 10}) as watched:
        killed = watched.wait_for("killed", timeout=5)
        assert killed is not None
        assert killed.why == "startup: /startupz: 503"
        assert killed.at >= 9 * SCALE
        asked = len(app.asked)
        time.sleep(5 * SCALE)
        assert len(app.asked) == asked, "until there is another container"


def test_a_pod_that_is_not_ready_loses_its_requests_and_not_its_life(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        assert watched.wait_for("ready", timeout=2) is not None
        app.status["/readyz"] = 503
        assert watched.wait_for("not ready", timeout=2) is not None
        ready = [watched.ready]
        seen = len(watched.events)
        app.status["/readyz"] = 200
        assert watched.wait_for("ready", timeout=2, after=seen) is not None
        assert [*ready, watched.ready] == [False, True]
    assert not watched.killed


def test_a_server_that_hangs_is_ended_after_three_timeouts(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        assert watched.wait_for("ready", timeout=2) is not None
        app.delay["/livez"] = 20 * SCALE
        begun = time.monotonic()
        killed = watched.wait_for("killed", timeout=10)
        assert killed is not None
        assert killed.why.startswith("liveness: /livez: ")
        # Three timeouts of 5 s one after the other; the first answer may have been due up to a period later.
        assert 15 * SCALE * 0.9 <= time.monotonic() - begun <= 40 * SCALE
    assert not watched.ready


def test_a_server_that_is_slow_now_and_then_lives(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        assert watched.wait_for("ready", timeout=2) is not None
        for _ in range(2):
            app.delay["/livez"] = 7 * SCALE
            time.sleep(8 * SCALE)
            app.delay["/livez"] = 0.0
            time.sleep(12 * SCALE)
    assert not watched.killed


def test_nobody_listening_is_a_failure_like_any_other() -> None:
    unreachable = {"startup": Probe(kind="startup", path="/", port=9, period=0.02, failure_threshold=3)}
    with Watch(unreachable) as watched:  # type: ignore[arg-type]
        killed = watched.wait_for("killed", timeout=2)
        assert killed is not None
        assert "refused" in killed.why


def test_without_a_startup_probe_the_others_begin_at_once_and_after_their_delay(app: App) -> None:
    app.status["/readyz"] = 302
    only = {"readiness": Probe(kind="readiness", path="/readyz", port=app.port, initial_delay=0.2, period=0.02)}
    with Watch(only) as watched:  # type: ignore[arg-type]
        ready = watched.wait_for("ready", timeout=2)
        assert ready is not None, "a redirection passes"
        assert ready.at >= 0.2


def test_probes_that_are_not_by_http_or_of_an_unknown_port_are_refused() -> None:
    with pytest.raises(BadInputError, match="the liveness probe is not by HTTP"):
        read_probes({"livenessProbe": {"exec": {"command": ["true"]}}})
    with pytest.raises(BadInputError, match="asks the port 'web'"):
        read_probes({"livenessProbe": {"httpGet": {"path": "/", "port": "web"}}})
    assert read_probes({"livenessProbe": {"httpGet": {"port": 80}}})["liveness"].period == 10
