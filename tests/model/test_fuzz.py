"""Generated requests: the server reports no internal error, and every response matches the OpenAPI document."""

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
#: Requests of each kind for each route. A refused request takes a tenth of a second, a spoken one longer.
EXAMPLES = 3
SECONDS = 900

# 503 is valid: at that moment no worker is ready. Every other 5xx status is a bug. The server must refuse requests
# that do not match the document.
CONFIG = f"""
continue-on-failure = true
max-failures = 20
request-timeout = 120.0
seed = 1

[generation]
max-examples = {EXAMPLES}
database = "none"
no-shrink = true

# Every limit of every field, as invalid requests. Valid ones are spoken: those of the fuzzing phase are enough, and
# test_synthesis.py speaks with each setting at its limits.
[phases.coverage.generation]
mode = "negative"

[checks]
enabled = false
not_a_server_error.enabled = true
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]
negative_data_rejection.enabled = true
negative_data_rejection.expected-statuses = ["4xx", "503"]
""" + "".join(f"{name}.enabled = true\n" for name in CHECKS)


@pytest.fixture(scope="module")
def server(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a server that limits every speech to six tokens."""
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "voices").mkdir()
    options = ("--warm", baked, "--weights", mini, "--cache", directory / "cache", "--max-new-tokens", "6")
    server = Server(directory / "log", *options, "--voices-dir", directory / "voices")
    try:
        server.wait("/readyz", 200)
        yield server
    finally:
        server.end()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_no_generated_request_causes_an_internal_error(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    status, document = server.ask("GET", "/openapi.json")
    assert status == 200
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    (tmp_path / "openapi.json").write_bytes(document)
    worker = server.worker()
    address = f"http://127.0.0.1:{server.port}"
    result = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", address],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr
    assert server.worker() == worker, "a request ended the worker"
    assert server.status()[0] == 200
    log = server.log.read_text()
    assert "Traceback" not in log, log[-5000:]
