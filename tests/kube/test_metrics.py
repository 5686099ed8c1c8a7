"""Alerts, autoscalers and the dashboard use only metrics that the server exposes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from chatterbox_prewarm.serve.http.http_metrics import HttpMetrics
from chatterbox_prewarm.serve.workers.messages import Usage
from chatterbox_prewarm.serve.workers.pools import Pools
from tests.helpers.dashboard import LABEL, dashboard, queries, variables
from tests.helpers.manifests import K8S

COMPONENTS = K8S / "components"
#: Labels that Prometheus adds to the samples of a pod; our monitor configures `node`.
ADDED = {"namespace", "pod", "node"}


class Worker:
    """The attributes of a worker that the metrics read, after a start with a cache miss."""

    config = SimpleNamespace(device="cuda")
    usage = Usage()
    ready, busy = True, False
    restarts = 1
    log = {  # noqa: RUF012 - as the worker reports it
        "state": "cuda-l4",
        "loaded": {"numba": 1},
        "hits": {"numba": 1},
        "misses": {"aot": 1},
        "phases": [{"name": "import", "seconds": 1.0}],
        "marks": {"attached": 2.0, "ready": 3.0},
    }


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Return the names of all samples with their labels."""
    pool: Any = SimpleNamespace(
        model="english",
        attached=True,
        ready=True,
        waiting=0,
        leading=Worker(),
        workers=[Worker()],
        backlog=SimpleNamespace(size=0),
    )
    admission: Any = SimpleNamespace(in_flight=2, limit=32)
    metrics = HttpMetrics(Pools([pool]), admission)
    metrics.responses.labels("english", "200").inc()
    text = metrics.render().decode()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bchatterbox_prewarm_\w+", expression))


def rules() -> list[dict[str, Any]]:
    raw = yaml.safe_load((COMPONENTS / "alerts" / "prometheus-rule.yaml").read_text())
    alerts: list[dict[str, Any]] = raw["spec"]["groups"][0]["rules"]
    return alerts


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_uses_exposed_metrics_and_labels(rule: dict[str, Any], exposed: dict[str, set[str]]) -> None:
    expression = rule["expr"]
    assert named(expression)
    assert named(expression) <= exposed.keys()
    known = ADDED | {label for name in named(expression) for label in exposed[name]}
    grouped = {
        label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")
    }
    assert grouped <= known
    in_texts = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
    assert in_texts <= known
    assert not grouped or "sum" not in expression or in_texts <= grouped, "a text uses a label that `sum` removes"


def test_misses_are_counted_by_model_and_family(exposed: dict[str, set[str]]) -> None:
    assert exposed["chatterbox_prewarm_cache_misses_total"] == {"family", "model"}


def test_the_autoscaler_uses_an_exposed_metric(exposed: dict[str, set[str]]) -> None:
    (metric,) = yaml.safe_load((COMPONENTS / "hpa" / "autoscaler.yaml").read_text())["spec"]["metrics"]
    assert exposed[metric["pods"]["metric"]["name"]] == set(), "one sample per pod"


@pytest.mark.parametrize(("panel", "query", "legend"), queries())
def test_a_panel_uses_exposed_metrics_and_labels(
    panel: str, query: str, legend: str, exposed: dict[str, set[str]]
) -> None:
    names = named(query)
    assert names, panel
    assert names <= exposed.keys()
    known = ADDED | {label for name in names for label in exposed[name]}
    grouped = {label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in group.split(",")}
    shown = set(LABEL.findall(legend))
    assert grouped | shown <= known
    if aggregated := re.match(r"(?:sum|max)(?: by \(([^)]*)\))?", query):
        kept = {label.strip() for label in (aggregated[1] or "").split(",")}
        assert shown <= kept, "the legend shows a label that the aggregation removes"


def test_the_dashboard_shows_every_metric(exposed: dict[str, set[str]]) -> None:
    shown = {name for _, query, _ in queries() for name in named(query)}
    hidden = {name for name in exposed.keys() - shown if not name.endswith(("_created", "_sum", "_count"))}
    assert hidden == set()


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_a_description() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in own) < 24
        assert not own & cells, panel["title"]
        cells |= own
    numbers = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_the_variables_of_the_dashboard_select_by_labels_of_a_pod(exposed: dict[str, set[str]]) -> None:
    for name, query in variables().items():
        assert named(query) <= exposed.keys()
        assert query.endswith(f", {name})")
        assert name in ADDED
    for _, query, _ in queries():
        for selector in re.findall(r"chatterbox_prewarm_\w+({[^}]*})?", query):
            assert all(f'{name}=~"${name}"' in selector for name in variables())
