"""Test what compiling for a GPU needs on a machine without one."""

from __future__ import annotations

import sysconfig
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import ModelError
from chatterbox_prewarm.system.gpu_stand_in import cuda_headers

if TYPE_CHECKING:
    from pathlib import Path


def test_missing_headers_of_cuda_are_reported_with_the_package_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(ModelError, match="the headers of CUDA are not installed"):
        cuda_headers()
    compiler = tmp_path / "triton" / "backends" / "nvidia" / "include"
    for path in (compiler / "cuda.h", runtime := tmp_path / "nvidia" / "cu13" / "include" / "cuda_runtime_api.h"):
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(ModelError, match="nv/target is not installed") as caught:
        cuda_headers()
    assert "nvidia-cuda-cccl" in caught.value.next_step
    (runtime.parent / "nv").mkdir()
    (runtime.parent / "nv" / "target").touch()
    assert cuda_headers() == [runtime.parent, compiler]
