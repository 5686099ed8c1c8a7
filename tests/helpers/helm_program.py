"""Lint and render a chart with Helm's engine: `helm_program.py CHART`, with the values as JSON on standard input.

It runs in the environment of `make checks`, which has Helm as a shared library. It prints the findings of the linter,
the documents by template, or the message of an error as JSON.
"""

from __future__ import annotations

import json
import sys

from helm_python import Chart, lint
from helm_python.errors import HelmError


def main() -> None:
    """Print the result as JSON."""
    path, request = sys.argv[1], json.load(sys.stdin)
    result: dict[str, object] = {"lint": lint(path, request["values"], strict=True)}
    try:
        with Chart.load(path) as chart:
            chart.validate_schema(request["values"])  # `helm install` does it, `render` does not
            result["rendered"] = chart.render(request["values"], name=request["name"], namespace="speech")
    except HelmError as error:
        result["error"] = str(error)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
