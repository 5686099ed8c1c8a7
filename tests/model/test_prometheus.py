"""Prometheus evaluates the queries of autoscalers, alerts and the dashboard on the metrics of real servers."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.conftest import ROOT, writable_copy
from tests.helpers.dashboard import LABEL, queries
from tests.helpers.manifests import K8S
from tests.helpers.prometheus import POD, Prometheus
from tests.helpers.serving import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.programs

COMPONENTS = K8S / "components"


@pytest.fixture(scope="module")
def server(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server from the warm state."""
    directory = tmp_path_factory.mktemp("server")
    paths = ("--warm", baked, "--weights", mini, "--cache", directory / "cache")
    server = Server(directory / "log", *paths, "--policy", "require")
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), server.port) as running:
        yield running


def adapter(metric: str) -> str:
    """Return the query that prometheus-adapter builds from the documented rule for a metric of this pod."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(rules:\n.*?)```", text, re.DOTALL)
    assert example is not None
    (rule,) = yaml.safe_load(example[1])["rules"]
    assert rule["seriesQuery"].partition("{")[0] == metric
    resources = {name: POD[name] for name in rule["resources"]["overrides"]}
    matchers = ",".join(f'{name}="{value}"' for name, value in resources.items())
    filled = {"<<.Series>>": metric, "<<.LabelMatchers>>": matchers, "<<.GroupBy>>": ",".join(resources)}
    query: str = rule["metricsQuery"]
    for placeholder, value in filled.items():
        query = query.replace(placeholder, value)
    return query


def test_the_autoscaler_reads_the_number_of_requests_in_flight(server: Server, prometheus: Prometheus) -> None:
    (metric,) = yaml.safe_load((COMPONENTS / "hpa" / "autoscaler.yaml").read_text())["spec"]["metrics"]
    query = adapter(metric["pods"]["metric"]["name"])
    pod = {name: POD[name] for name in ("namespace", "pod")}
    assert prometheus.query(query) == [(pod, 0.0)]
    with ThreadPoolExecutor(5) as clients:
        requests = [clients.submit(server.speak, max_new_tokens=150, seed=seed) for seed in range(5)]
        prometheus.wait(query, lambda found: found == [(pod, 5.0)])
        assert 5.0 / float(metric["pods"]["target"]["averageValue"]) > 2, "the autoscaler starts three pods"
        assert [request.result()[0] for request in requests] == [200] * 5
    prometheus.wait(query, lambda found: found == [(pod, 0.0)])


def test_the_dashboard_shows_a_warm_pod(server: Server, prometheus: Prometheus) -> None:
    """Each query has a sample with the labels of its legend, except those of events that did not happen."""
    assert server.speak(max_new_tokens=12, seed=1)[0] == 200
    prometheus.wait("increase(chatterbox_prewarm_real_time_factor_count[30s]) > 0", bool)
    prometheus.wait("rate(chatterbox_prewarm_speech_answers_total[30s])", bool)  # needs two samples
    empty = set()
    for panel, query, legend in queries(namespace=POD["namespace"], pod=POD["pod"], interval="30s"):
        samples = prometheus.query(query)
        if not samples:
            empty.add(panel)
        assert all(set(LABEL.findall(legend)) <= labels.keys() for labels, _ in samples), panel
    assert empty == {"Cache misses by family and node", "Artifacts made available"}
    values = {
        panel: prometheus.query(query)[0][1]
        for panel, query, _ in queries(namespace=POD["namespace"], pod=POD["pod"], interval="30s")
        if panel in {"Pods ready", "Pods starting", "Cache misses", "Pods without a state"}
    }
    assert values == {"Pods ready": 1.0, "Pods starting": 0.0, "Cache misses": 0.0, "Pods without a state": 0.0}


def test_a_warm_pod_fires_no_alert(prometheus: Prometheus) -> None:
    rules = prometheus.evaluated_rules()
    assert len(rules) == 6
    assert {name: rule["lastError"] for name, rule in rules.items() if rule.get("lastError")} == {}
    assert {name: rule["state"] for name, rule in rules.items()} == dict.fromkeys(rules, "inactive")
    assert {rule["health"] for rule in rules.values()} == {"ok"}


def test_a_dead_worker_fires_an_alert(server: Server, prometheus: Prometheus) -> None:
    os.kill(server.worker(), signal.SIGKILL)
    alert = prometheus.wait_for_alert("ChatterboxWorkerRestarts", "firing")
    assert alert["annotations"]["summary"] == f"a worker of english in {POD['pod']} died and was replaced"
    assert alert["labels"].items() >= {"severity": "warning", **POD}.items()
    server.wait_ready()


def test_a_miss_fires_an_alert_with_the_family_and_a_command_for_the_reason(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    state = writable_copy(baked, tmp_path / "warm")
    damaged = max((path for path in state.rglob("*.nbi")), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes() + b"x")
    server = Server(tmp_path / "log", "--warm", state, "--weights", mini, "--cache", tmp_path / "cache")
    try:
        server.wait_ready()
        missed = server.status("/startupz")[1]["misses"]
        assert missed
        (tmp_path / "prometheus").mkdir()
        with Prometheus(tmp_path / "prometheus", server.port) as prometheus:
            found = prometheus.wait("chatterbox_prewarm_cache_misses_total", lambda found: len(found) == len(missed))
            assert {labels["family"]: value for labels, value in found} == missed
            rules = prometheus.evaluated_rules()
            assert rules["ChatterboxWithoutWarmState"]["state"] == "inactive", "the other families hit"
            firing = rules["ChatterboxWarmStateMissed"]
            assert firing["state"] == "firing"
            families = {alert["labels"]["family"] for alert in firing["alerts"]}
            assert families == missed.keys()
            for alert in firing["alerts"]:
                why = alert["annotations"]["why"]
                assert why == f"kubectl -n {POD['namespace']} logs {POD['pod']} | grep 'miss in'"
                assert POD["node"] in alert["annotations"]["summary"]
        server.wait_log("miss in")  # the command of the alert searches for this
    finally:
        server.end()
