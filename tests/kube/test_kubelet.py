"""The kubelet's rules for probes, tested with a local server whose answers are set by the test. Times are scaled."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest
import yaml

from benchmarks.kubelet import Probe, Threshold, Watch, read_probes
from chatterbox_prewarm.errors import BadInputError
from tests.helpers.manifests import K8S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.kubelet import Kind

#: Duration in these tests of one second in a manifest.
SCALE = 0.05


class App:
    """Server with three health routes; the test sets their status and their delay in seconds."""

    def __init__(self) -> None:
        self.status = {"/startupz": 503, "/livez": 200, "/readyz": 503}
        self.delay = dict.fromkeys(self.status, 0.0)
        self.requests: list[str] = []
        self.port = 0


@pytest.fixture
def app() -> Iterator[App]:
    app = App()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            app.requests.append(self.path)
            time.sleep(app.delay[self.path])
            with contextlib.suppress(ConnectionError):
                self.send_response(app.status[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        app.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield app
        server.shutdown()
        thread.join()


def probes_of_the_base() -> dict[Kind, Probe]:
    deployment = yaml.safe_load((K8S / "base" / "deployment.yaml").read_text())
    return read_probes(deployment["spec"]["template"]["spec"]["containers"][0])


def probes(**changes: dict[str, float]) -> dict[Kind, Probe]:
    """Return the scaled probes of the base. The startup probe allows 100 failures unless it is changed."""
    in_base = probes_of_the_base()
    scaled = {
        kind: replace(probe, period=probe.period * SCALE, timeout=probe.timeout * SCALE)
        for kind, probe in in_base.items()
    }
    scaled["startup"] = replace(scaled["startup"], failure_threshold=100)
    return {kind: replace(probe, **changes.get(kind, {})) for kind, probe in scaled.items()}  # type: ignore[arg-type]


def watch(app: App, **changes: dict[str, float]) -> Watch:
    return Watch(probes(**changes), published={8000: app.port})


def test_the_probes_of_the_base_are_read() -> None:
    in_base = probes_of_the_base()
    assert in_base["startup"] == Probe(kind="startup", path="/startupz", port=8000, period=1, failure_threshold=360)
    assert in_base["liveness"] == Probe(kind="liveness", path="/livez", port=8000, period=5, timeout=5, grace=20)
    assert in_base["readiness"] == Probe(kind="readiness", path="/readyz", port=8000, period=1)
    assert (in_base["readiness"].failure_threshold, in_base["readiness"].timeout) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "thresholds", "answers", "results"),
    [
        ("readiness", (1, 3), "+--+---+", [True, True, True, True, True, True, False, True]),
        ("liveness", (1, 3), "--+---", [True, True, True, True, True, False]),
        ("startup", (1, 3), "--+", [None, None, True]),
        ("readiness", (2, 1), "+-++", [False, False, False, True]),
    ],
)
def test_a_result_counts_when_it_occurred_often_enough_in_a_row(
    kind: Kind, thresholds: tuple[int, int], answers: str, results: list[bool | None]
) -> None:
    successes, failures = thresholds
    threshold = Threshold(Probe(kind=kind, path="/", port=1, success_threshold=successes, failure_threshold=failures))
    actual = []
    for answer in answers:
        threshold.take(answer == "+")
        actual.append(threshold.result)
    assert actual == results


def test_a_warm_start_is_ready_immediately(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        ready = watched.wait_for("ready", timeout=2)
        assert ready is not None
        assert watched.ready
    assert [event.kind for event in watched.events] == ["started", "ready"]
    assert ready.at < 10 * SCALE, "the readiness probe runs as soon as the container has started"


def test_other_probes_run_only_after_the_startup_probe(app: App) -> None:
    app.status["/livez"] = 500
    with watch(app) as watched:
        time.sleep(20 * SCALE)
        assert set(app.requests) == {"/startupz"}
        app.status.update({"/startupz": 200, "/livez": 200, "/readyz": 200})
        assert watched.wait_for("ready", timeout=2) is not None
        count = app.requests.count("/startupz")
        time.sleep(5 * SCALE)
        assert app.requests.count("/startupz") == count, "the startup probe has ended"
    assert not watched.killed


def test_a_start_is_ended_only_after_its_time_limit(app: App) -> None:
    with watch(app) as watched:
        time.sleep(30 * SCALE)
        assert watched.events == []
        app.status["/startupz"] = 200
        assert watched.wait_for("started", timeout=2) is not None
    app.status["/startupz"] = 503
    with watch(app, startup={"failure_threshold": 10}) as watched:
        killed = watched.wait_for("killed", timeout=5)
        assert killed is not None
        assert killed.reason == "startup: /startupz: 503"
        assert killed.at >= 9 * SCALE
        count = len(app.requests)
        time.sleep(5 * SCALE)
        assert len(app.requests) == count, "the watch has ended"


def test_a_pod_that_is_not_ready_gets_no_requests_but_is_not_ended(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        assert watched.wait_for("ready", timeout=2) is not None
        app.status["/readyz"] = 503
        assert watched.wait_for("not ready", timeout=2) is not None
        ready = [watched.ready]
        earlier = len(watched.events)
        app.status["/readyz"] = 200
        assert watched.wait_for("ready", timeout=2, after=earlier) is not None
        assert [*ready, watched.ready] == [False, True]
    assert not watched.killed


def test_a_hung_server_is_ended_after_three_timeouts(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        assert watched.wait_for("ready", timeout=2) is not None
        app.delay["/livez"] = 20 * SCALE
        begun = time.monotonic()
        killed = watched.wait_for("killed", timeout=10)
        assert killed is not None
        assert killed.reason.startswith("liveness: /livez: ")
        # Three consecutive timeouts of 5 s. The first probe may have been due up to one period later.
        assert 15 * SCALE * 0.9 <= time.monotonic() - begun <= 40 * SCALE
    assert not watched.ready


def test_a_server_that_is_slow_at_times_is_not_ended(app: App) -> None:
    app.status.update({"/startupz": 200, "/readyz": 200})
    with watch(app) as watched:
        assert watched.wait_for("ready", timeout=2) is not None
        for _ in range(2):
            app.delay["/livez"] = 7 * SCALE
            time.sleep(8 * SCALE)
            app.delay["/livez"] = 0.0
            time.sleep(12 * SCALE)
    assert not watched.killed


def test_a_refused_connection_is_a_failure() -> None:
    unreachable = {"startup": Probe(kind="startup", path="/", port=9, period=0.02, failure_threshold=3)}
    with Watch(unreachable) as watched:  # type: ignore[arg-type]
        killed = watched.wait_for("killed", timeout=2)
        assert killed is not None
        assert "refused" in killed.reason


def test_without_a_startup_probe_other_probes_begin_after_their_delay(app: App) -> None:
    app.status["/readyz"] = 302
    only = {"readiness": Probe(kind="readiness", path="/readyz", port=app.port, initial_delay=0.2, period=0.02)}
    with Watch(only) as watched:  # type: ignore[arg-type]
        ready = watched.wait_for("ready", timeout=2)
        assert ready is not None, "a redirect passes"
        assert ready.at >= 0.2


def test_probes_without_http_or_with_an_unknown_port_are_refused() -> None:
    with pytest.raises(BadInputError, match="the liveness probe does not use HTTP"):
        read_probes({"livenessProbe": {"exec": {"command": ["true"]}}})
    with pytest.raises(BadInputError, match="uses the unknown port 'web'"):
        read_probes({"livenessProbe": {"httpGet": {"path": "/", "port": "web"}}})
    assert read_probes({"livenessProbe": {"httpGet": {"port": 80}}})["liveness"].period == 10
