"""Test the adaptive warm-up: immediately in Python, and in an idle server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch

from chatterbox_prewarm import AdaptiveWarmup
from chatterbox_prewarm.model.warmup.adaptive import WarmupPlan, WarmupStep
from chatterbox_prewarm.system.metrics import StartMetrics
from tests.helpers.serving import SENTENCE, Server

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached

STEPS = {f"warm-up of {count} speech tokens" for count in (50, 100, 200)}


@pytest.mark.slow
def test_adaptive_warm_up_keeps_the_state_of_the_generators(attached: Attached) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    metrics = StartMetrics()
    plan = AdaptiveWarmup(attached.synthesizer, metrics=metrics).warm_up_for_workload(5)
    assert plan.level == 2
    assert {phase["name"] for phase in metrics.phases} == STEPS
    assert torch.equal(torch.rand(3), expected)


def test_environment_variable_switches_the_warm_up_off(attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_PREWARM_WARMUP", "off")
    metrics = StartMetrics()
    AdaptiveWarmup(attached.synthesizer, metrics=metrics).warm_up_for_workload(100)
    assert metrics.phases == []


def test_the_load_decides_between_an_aggressive_and_a_conservative_warm_up(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(
        WarmupPlan,
        "steps",
        lambda plan, _: [WarmupStep(name=f"{n}", run=lambda _: ran.append("step")) for n in plan.tokens],
    )
    warmup = AdaptiveWarmup(attached)
    assert warmup.enable_conservative_warmup() == warmup.warm_up_for_workload(expected_requests_per_minute=0.5)
    assert ran == []
    assert warmup.enable_aggressive_warmup() == warmup.warm_up_for_workload(expected_requests_per_minute=11)
    assert len(ran) == 14


@pytest.mark.slow
def test_server_is_ready_before_the_warm_up_and_warms_up_while_idle(baked: Path, mini: Path, tmp_path: Path) -> None:
    server = Server(
        tmp_path / "log",
        *("--warm", baked, "--weights", mini, "--cache", tmp_path / "cache", "--requests-per-minute", "5"),
    )
    try:
        body = server.wait("/readyz", 200)
        assert not STEPS & set(body["timers"])
        assert (
            server.speak()[0] == 200
        )  # the request comes before a step or interrupts it; the server then repeats the step
        deadline = time.monotonic() + 300
        while not set(body["timers"]) >= STEPS:
            assert time.monotonic() < deadline
            time.sleep(0.5)
            body = server.wait("/readyz", 200)
        assert body["phase"] == "ready"
        assert body["misses"] == {}
        assert server.speak(**SENTENCE)[0] == 200
    finally:
        assert server.end() == 0
