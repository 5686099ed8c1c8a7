"""Test the compilation of packages: errors name the region and the cause, and no process keeps running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.regions.compile_packages import _find_driver, compile_packages
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.start.attach import Attached


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_PREWARM_PARENT", str(os.getpid()))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "2")


def test_error_names_the_region_that_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(f"{compile_packages.__module__}.detail", lambda *arguments, **_: shown.extend(arguments))
    with pytest.raises(ModelError, match="region vocoder_pitch cannot be compiled") as caught:
        compile_packages({"vocoder_pitch": [torch.zeros(3, 3)]}, tmp_path)
    assert "g++" in caught.value.next_step
    assert shown == []
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_full_disk_is_not_reported_as_a_missing_compiler(
    small_disk: Path, tmp_path: Path, attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_of: dict[str, Sequence[torch.Tensor]] = {}

    def record_weights(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        weights_of[region.name] = weights
        return eager(region, weights)

    Flow(NamedTensors(attached.synthesizer.model.tensors, "s3gen.flow."), record_weights)
    monkeypatch.setenv("TMPDIR", str(small_disk))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(small_disk / "inductor"))
    with pytest.raises(BadInputError, match="No space left on device") as caught:
        compile_packages({"flow_euler": weights_of["flow_euler"]}, tmp_path / "packages")
    assert "free some space" in caught.value.next_step
    assert not (tmp_path / "packages").exists()


def test_linker_finds_the_loaded_library_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    _find_driver(tmp_path, "7f00-7f01 r--p 00000000 08:01 12 /usr/lib/libc.so.6\n7f02-7f03 rw-p 00000000 00:00 0\n")
    assert list(tmp_path.iterdir()) == []
    _find_driver(tmp_path, "7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/libcuda.so.550.54\n" * 2)
    assert str((tmp_path / "libcuda.so").readlink()) == "/usr/lib/libcuda.so.550.54"
    assert os.environ["LIBRARY_PATH"] == f"{tmp_path}{os.pathsep}/elsewhere"


@pytest.mark.usefixtures("compiler")
def test_killed_compiler_is_reported(tmp_path: Path) -> None:
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
        compile_packages({"vocoder_pitch": [*weights, torch.zeros(1, 512), torch.zeros(1)]}, tmp_path)
    killer.join()
    assert "memory" in caught.value.next_step
    assert list(tmp_path.iterdir()) == []
