"""Read the Grafana dashboard in k8s/components/dashboard."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.helpers.manifests import K8S

#: A label in the legend of a query.
LABEL = re.compile(r"\{\{(\w+)\}\}")


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    raw: dict[str, Any] = json.loads((K8S / "components" / "dashboard" / "chatterbox.json").read_text())
    return raw


def queries(*, namespace: str = "$namespace", pod: str = "$pod", interval: str = "1m") -> list[tuple[str, str, str]]:
    """Return the title of the panel, the expression and the legend of each query, with the variables replaced."""
    replaced = {"$namespace": namespace, "$pod": pod, "$__rate_interval": interval}
    found = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for variable, value in replaced.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression, target["legendFormat"]))
    return found


def variables() -> dict[str, str]:
    """Return the query of each variable that Prometheus answers."""
    return {one["name"]: one["query"]["query"] for one in dashboard()["templating"]["list"] if one["type"] == "query"}
