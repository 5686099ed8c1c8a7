"""The HTTP interface under generated requests: no fault, and every answer as the OpenAPI document says."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers.serving import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHECKS = (
    "allow_header_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "status_code_conformance",
    "unsupported_method",
)
#: Of each kind for each route; a tenth of a second each when they are refused, and some more when they are spoken.
EXAMPLES = 5
SECONDS = 900

# A 503 is an answer of a server that has no worker just now, and no fault; what else begins with 5 is. What is against
# the document must be refused.
CONFIG = f"""
continue-on-failure = true
max-failures = 20
request-timeout = 120.0
seed = 1

[generation]
max-examples = {EXAMPLES}
database = "none"
no-shrink = true

[checks]
enabled = false
not_a_server_error.enabled = true
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]
negative_data_rejection.enabled = true
negative_data_rejection.expected-statuses = ["4xx", "503"]
""" + "".join(f"{name}.enabled = true\n" for name in CHECKS)


@pytest.fixture(scope="module")
def server(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose longest speech is short, whatever a request asks for."""
    place = tmp_path_factory.mktemp("fuzz")
    (place / "voices").mkdir()
    options = ("--warm", baked, "--weights", mini, "--cache", place / "cache", "--max-new-tokens", "6")
    server = Server(place / "log", *options, "--voices-dir", place / "voices")
    try:
        server.wait("/readyz", 200)
        yield server
    finally:
        server.end()


def test_no_generated_request_finds_a_fault(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    status, document = server.ask("GET", "/openapi.json")
    assert status == 200
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "openapi.json").write_bytes(document)
    worker = server.worker()
    address = f"http://127.0.0.1:{server.port}"
    found = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", address],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    print(found.stdout)
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr
    assert server.worker() == worker, "a request ended the worker"
    assert server.status()[0] == 200
    log = server.log.read_text()
    assert "Traceback" not in log, log[-5000:]
