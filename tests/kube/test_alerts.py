"""Each alert fires for its condition after its time. `promtool` evaluates the rules for samples."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.helpers.prometheus import POD, program, rule_file

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.programs

LABELS = "{" + ",".join(f'{name}="{value}"' for name, value in POD.items()) + "}"
VOICE = LABELS.replace("}", ',family="conditionals"}')
FAMILY = LABELS.replace("}", ',family="aot"}')


def sample(name: str, labels: str = LABELS) -> str:
    return f"chatterbox_prewarm_{name}{labels}"


IN_FLIGHT = sample("requests_in_flight")
#: Alert, samples of each series (one every 15 s), when it does not fire, when it fires (None: never),
#: labels that it adds.
CASES: list[tuple[str, dict[str, str], str, str | None, dict[str, str]]] = [
    ("ChatterboxWarmStateMissed", {sample("cache_misses_total", FAMILY): "_ 1x20"}, "0s", "15s", {"family": "aot"}),
    ("ChatterboxWarmStateMissed", {sample("cache_hits_total", FAMILY): "5x20"}, "0s", None, {}),
    ("ChatterboxWarmStateMissed", {sample("cache_misses_total", VOICE): "1x20"}, "0s", None, {}),
    ("ChatterboxWithoutWarmState", {sample("ready"): "1x20"}, "45s", "60s", {}),
    ("ChatterboxWithoutWarmState", {sample("ready"): "1x20", sample("state"): "1x20"}, "60s", None, {}),
    ("ChatterboxSlowStart", {sample("attached"): "0x20"}, "105s", "120s", {}),
    ("ChatterboxSlowStart", {sample("attached"): "0x6 1x20"}, "90s", None, {}),
    ("ChatterboxWorkerRestarts", {sample("worker_restarts_total"): "0x4 1x20"}, "60s", "75s", {}),
    ("ChatterboxWorkerRestarts", {sample("worker_restarts_total"): "0x20"}, "60s", None, {}),
    ("ChatterboxNotReady", {sample("attached"): "1x20", sample("ready"): "0x20"}, "105s", "120s", {}),
    ("ChatterboxNotReady", {sample("attached"): "1x20", sample("ready"): "0x6 1x20"}, "105s", None, {}),
    ("ChatterboxQueueFull", {IN_FLIGHT: "1x4 6x20", sample("queue_limit"): "8x30"}, "165s", "195s", {}),
    ("ChatterboxQueueFull", {IN_FLIGHT: "30x4 23x20", sample("queue_limit"): "32x30"}, "180s", None, {}),
]  # fmt: skip


@pytest.mark.parametrize(("alert", "series", "silent_at", "fires_at", "extra_labels"), CASES)
def test_an_alert_fires_only_for_its_condition(
    alert: str,
    series: dict[str, str],
    silent_at: str,
    fires_at: str | None,
    extra_labels: dict[str, str],
    tmp_path: Path,
) -> None:
    expected: list[dict[str, Any]] = [{"eval_time": silent_at, "alertname": alert, "exp_alerts": []}]
    labels = {**POD, **extra_labels, "severity": "warning"}
    if fires_at is None:
        expected.append({"eval_time": "5m", "alertname": alert, "exp_alerts": []})
    else:
        expected.append({"eval_time": fires_at, "alertname": alert, "exp_alerts": [{"exp_labels": labels}]})
    test = {
        # Without texts, which promtool would compare. tests/model checks the texts of real alerts.
        "rule_files": [str(rule_file(tmp_path, texts=False))],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": expected,
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    finished = subprocess.run(
        [program("promtool"), "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
