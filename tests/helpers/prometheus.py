"""A Prometheus of its own for tests, which scrapes one server as the component `monitor` has it scrape a pod."""

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

#: What Prometheus knows of a pod, and adds to each of its samples.
POD = {"namespace": "speech", "pod": "chatterbox-7c9-x2x", "node": "node-1"}


def rule_file(folder: Path, *, texts: bool = True) -> Path:
    """The rules of the component `alerts`, as the operator hands them to Prometheus; on demand without annotations."""
    raw = yaml.safe_load((K8S / "components" / "alerts" / "prometheus-rule.yaml").read_text())
    for rule in raw["spec"]["groups"][0]["rules"]:
        if not texts:
            del rule["annotations"]
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(raw["spec"]))
    return path


def program(name: str) -> str:
    """The path of a program of Debian's package `prometheus`; skips without it."""
    if (found := shutil.which(name)) is None:
        pytest.skip(f"there is no {name} (Debian: apt-get install prometheus)")
    return found


class Prometheus:
    """A context manager that runs one; it asks the server at `port` twice a second."""

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
            self.wait("up", lambda found: [value for _, value in found] == [1.0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The vector that an expression gives now: labels and value of each."""
        found = self._ask(f"query?{urlencode({'query': expression})}")["result"]
        return [(entry["metric"], float(entry["value"][1])) for entry in found]

    def rules(self) -> dict[str, dict[str, Any]]:
        """Each alert as the rules' evaluation left it."""
        (group,) = self._ask("rules")["groups"]
        return {rule["name"]: rule for rule in group["rules"]}

    def evaluated_rules(self) -> dict[str, dict[str, Any]]:
        """The same after all rules have been evaluated once more."""
        now = datetime.now(timezone.utc).isoformat()
        deadline = time.monotonic() + 30
        while True:
            found = self.rules()
            if all(rule["lastEvaluation"] > now for rule in found.values()):
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    def wait(self, expression: str, wanted: Any, seconds: float = 30.0) -> list[tuple[dict[str, str], float]]:
        """Ask until the vector is as wanted."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self.query(expression)
            except (OSError, ValueError, KeyError):  # it starts
                found = []
            if wanted(found):
                return found
            assert time.monotonic() < deadline, (found, (self._folder / "log").read_text()[-2000:])
            time.sleep(0.1)

    def wait_for_alert(self, name: str, state: str, seconds: float = 30.0) -> dict[str, Any]:
        """Ask until an alert has a state; returns the one instance of it."""
        deadline = time.monotonic() + seconds
        while (rule := self.rules()[name])["state"] != state:
            assert time.monotonic() < deadline, rule
            time.sleep(0.1)
        (alert,) = rule["alerts"]
        found: dict[str, Any] = alert
        return found

    def _ask(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/{path}")
            return json.loads(connection.getresponse().read())["data"]
        finally:
            connection.close()
