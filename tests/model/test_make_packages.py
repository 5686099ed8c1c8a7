"""The making of packages: what cannot be compiled is named, a killed compiler is said, and nothing is left running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.regions.make_packages import make_packages

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_PREWARM_PARENT", str(os.getpid()))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")


def test_a_region_that_cannot_be_compiled_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ModelError, match="region vocoder_pitch cannot be compiled") as caught:
        make_packages({"vocoder_pitch": [torch.zeros(3, 3)]}, tmp_path, progress=said.append)
    assert "g++" in caught.value.next_step
    assert said == []
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_a_compiler_that_is_killed_is_said(tmp_path: Path) -> None:
    def kill() -> None:
        for _ in range(600):
            if workers := multiprocessing.active_children():
                os.kill(int(workers[0].pid or 0), signal.SIGKILL)
                return
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    weights = [torch.zeros(512, 80, 3), torch.zeros(512), *[torch.zeros(512, 512, 3), torch.zeros(512)] * 4]
    with pytest.raises(ModelError, match="was killed") as caught:
        make_packages(
            {"vocoder_pitch": [*weights, torch.zeros(1, 512), torch.zeros(1)]}, tmp_path, progress=lambda _: None
        )
    killer.join()
    assert "memory" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []
