"""Alerts and autoscalers use nothing but what the server exposes."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from chatterbox_prewarm.serve.http.exposition import Exposition
from chatterbox_prewarm.serve.http.http_metrics import Measures
from chatterbox_prewarm.serve.workers.messages import Usage
from tests.helpers.manifests import K8S

COMPONENTS = K8S / "components"
#: Labels that Prometheus adds to what it scrapes from a pod (and `node`, which our monitor has it add).
ADDED = {"namespace", "pod", "node"}


class Worker:
    """What an exposition reads of a worker, after a start that missed."""

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
    """The names of all samples, each with its labels."""
    pool: Any = SimpleNamespace(attached=True, ready=True, waiting=0, leading=Worker(), workers=[Worker()])
    admission: Any = SimpleNamespace(in_flight=2, limit=32)
    text = Exposition(pool, admission, Measures()).render().decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bchatterbox_prewarm_\w+", expression))


def rules() -> list[dict[str, Any]]:
    raw = yaml.safe_load((COMPONENTS / "alerts" / "prometheus-rule.yaml").read_text())
    found: list[dict[str, Any]] = raw["spec"]["groups"][0]["rules"]
    return found


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_there_is(rule: dict[str, Any], exposed: dict[str, set[str]]) -> None:
    expression = rule["expr"]
    assert named(expression)
    assert named(expression) <= exposed.keys()
    known = ADDED | {label for name in named(expression) for label in exposed[name]}
    grouped = {
        label.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(",")
    }
    assert grouped <= known
    said = {label for text in rule["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
    assert said <= known
    assert not grouped or "sum" not in expression or said <= grouped, "a label that is summed away cannot be said"


def test_a_miss_and_its_family_are_counted(exposed: dict[str, set[str]]) -> None:
    assert exposed["chatterbox_prewarm_cache_misses_total"] == {"family"}


def test_autoscalers_ask_for_what_there_is(exposed: dict[str, set[str]]) -> None:
    (metric,) = yaml.safe_load((COMPONENTS / "hpa" / "autoscaler.yaml").read_text())["spec"]["metrics"]
    assert exposed[metric["pods"]["metric"]["name"]] == set(), "one sample for each pod"
    triggers = yaml.safe_load((COMPONENTS / "keda" / "scaled-object.yaml").read_text())["spec"]["triggers"]
    (query,) = [trigger["metadata"]["query"] for trigger in triggers if trigger["type"] == "prometheus"]
    assert named(query) == {metric["pods"]["metric"]["name"]}
    assert set(re.findall(r"(\w+)=~?\"", query)) <= ADDED
