"""Run Prometheus in a test. It scrapes one server as the component `monitor` configures it for a pod."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
import yaml

from chatterbox_prewarm.bench.server import free_port
from tests.helpers.manifests import K8S

if TYPE_CHECKING:
    from pathlib import Path

#: Labels of the pod that Prometheus adds to each sample.
POD = {"namespace": "speech", "pod": "chatterbox-7c9-x2x", "node": "node-1"}


def rule_file(folder: Path, *, texts: bool = True) -> Path:
    """Write the rules of the component `alerts` as the operator passes them to Prometheus, optionally without texts."""
    raw = yaml.safe_load((K8S / "components" / "alerts" / "prometheus-rule.yaml").read_text())
    for rule in raw["spec"]["groups"][0]["rules"]:
        if not texts:
            del rule["annotations"]
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(raw["spec"]))
    return path


def program(name: str) -> str:
    """Return the path of a program of Debian's package `prometheus`; skip the test if it is not installed."""
    if (path := shutil.which(name)) is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install prometheus)")
    return path


class Prometheus:
    """Context manager that runs Prometheus. It scrapes the server at `port` twice a second."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = free_port()
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(rule_file(folder))],
            "scrape_configs": [
                {"job_name": "chatterbox", "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": POD}]}
            ],
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def __enter__(self) -> Prometheus:
        command = [
            *(program("prometheus"), f"--config.file={self._folder}/config.yaml", "--log.level=warn"),
            *(f"--storage.tsdb.path={self._folder}/data", f"--web.listen-address=127.0.0.1:{self._port}"),
        ]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.wait("up", lambda samples: [value for _, value in samples] == [1.0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Evaluate an expression; return labels and value of each sample."""
        vector = self._get(f"query?{urlencode({'query': expression})}")["result"]
        return [(entry["metric"], float(entry["value"][1])) for entry in vector]

    def rules(self) -> dict[str, dict[str, Any]]:
        """Return the current state of each alerting rule."""
        (group,) = self._get("rules")["groups"]
        return {rule["name"]: rule for rule in group["rules"]}

    def evaluated_rules(self) -> dict[str, dict[str, Any]]:
        """Return the state of each alerting rule after the next evaluation."""
        now = datetime.now(timezone.utc).isoformat()
        deadline = time.monotonic() + 30
        while True:
            rules = self.rules()
            if all(rule["lastEvaluation"] > now for rule in rules.values()):
                return rules
            assert time.monotonic() < deadline, rules
            time.sleep(0.1)

    def wait(self, expression: str, condition: Any, seconds: float = 30.0) -> list[tuple[dict[str, str], float]]:
        """Evaluate an expression until `condition` returns True for its samples."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                samples = self.query(expression)
            except (OSError, ValueError, KeyError):  # Prometheus is starting
                samples = []
            if condition(samples):
                return samples
            assert time.monotonic() < deadline, (samples, (self._folder / "log").read_text()[-2000:])
            time.sleep(0.1)

    def wait_for_alert(self, name: str, state: str, seconds: float = 30.0) -> dict[str, Any]:
        """Wait until an alert has a state; return its only instance."""
        deadline = time.monotonic() + seconds
        while (rule := self.rules()[name])["state"] != state:
            assert time.monotonic() < deadline, rule
            time.sleep(0.1)
        alert: dict[str, Any]
        (alert,) = rule["alerts"]
        return alert

    def _get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/{path}")
            return json.loads(connection.getresponse().read())["data"]
        finally:
            connection.close()
