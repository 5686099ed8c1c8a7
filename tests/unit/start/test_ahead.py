"""Test the work that a start does in threads while Python imports."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading

import pytest

from chatterbox_prewarm.start.ahead import Ahead, create_context
from chatterbox_prewarm.system.metrics import StartMetrics

#: Loads torch's libraries twice, then torch, and prints what happened as JSON.
_LIBRARIES = """
import json, os, sys
from chatterbox_prewarm.start.ahead import torch_libraries
from chatterbox_prewarm.system.metrics import StartMetrics
metrics = StartMetrics()
torch_libraries().wait(metrics)
torch_libraries().wait(metrics)
loaded = "libtorch_cpu.so" in open("/proc/self/maps").read()
imported = "torch" in sys.modules
import torch
print(json.dumps({"loaded": loaded, "imported": imported, "spins": os.environ["GOMP_SPINCOUNT"],
    "phases": [phase["name"] for phase in metrics.phases], "sum": torch.ones(3).sum().item()}))
"""


def test_work_runs_while_the_start_continues_and_becomes_a_phase() -> None:
    continued = threading.Event()
    seen = []
    work = Ahead("work", lambda: seen.append(continued.wait(30)))
    continued.set()
    metrics = StartMetrics()
    work.wait(metrics)
    assert seen == [True]
    assert [phase["name"] for phase in metrics.phases] == ["work"]
    assert metrics.phases[0]["seconds"] > 0


def test_work_that_fails_is_logged_and_does_not_end_the_start(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("no driver")

    metrics = StartMetrics()
    with caplog.at_level(logging.INFO):
        Ahead("a context", fail).wait(metrics)
    assert "a context failed: no driver" in caplog.text
    assert [phase["name"] for phase in metrics.phases] == ["a context"]


def test_torchs_libraries_are_loaded_once_and_without_importing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", _LIBRARIES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = {"loaded": True, "imported": False, "spins": "1000", "phases": ["torch's libraries"], "sum": 3.0}
    assert json.loads(done.stdout) == expected


def test_a_process_that_ends_at_once_waits_for_the_libraries() -> None:
    program = "from chatterbox_prewarm.start.ahead import torch_libraries\ntorch_libraries()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_gpu_is_an_error_of_the_operating_system() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(OSError, match=r"libcuda|driver returned"):
        create_context(0)
