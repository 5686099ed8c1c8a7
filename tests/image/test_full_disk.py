"""An engine whose disk becomes full reports it, and leaves no unfinished image or container behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.engines.docker import DockerEngine
from chatterbox_prewarm.image.engines.engine import ContainerRun, run_build
from chatterbox_prewarm.image.engines.podman import PodmanEngine
from chatterbox_prewarm.image.oci import Image
from tests.helpers.images import layer_of
from tests.image.conftest import copy_programs

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.image.layer import Layer
    from tests.image.conftest import Storage

TAG = "chatterbox-prewarm-test:full"
EMPTY_IMAGE = Image(
    config={"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": []}},
    layers=(),
)


def large_image(megabytes: int) -> tuple[Layer, Image]:
    layer = layer_of({"zeros": bytes(megabytes << 20)})
    return layer, add_layers(EMPTY_IMAGE, [layer], Change(), created="2026-01-01T00:00:00Z")


def large_context(folder: Path, megabytes: int) -> Path:
    """Write a context whose build step writes a file of this size, so that the context itself stays small."""
    folder.mkdir()
    copy_programs(folder / "root", "sh", "cat")
    (folder / "block").write_bytes(os.urandom(1 << 20))
    step = f"i=0; while [ $i -lt {megabytes} ]; do cat /block || exit 1; i=$((i+1)); done > /noise"
    (folder / "Dockerfile").write_text(f"FROM scratch\nCOPY root /\nCOPY block /\nRUN {step}\n")
    return folder


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_docker_without_space_for_a_step_fails_the_build(
    docker: str,
    small_engine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    builder: str,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", small_engine)
    context = large_context(tmp_path / "context", 300)
    classic = builder == "classic"
    dockerfile = (context / "Dockerfile").read_text() if classic else None
    with contextlib.closing(DockerEngine()) as engine:
        arguments = [*(("--file=-",) if classic else ()), "--network=none", "--tag", TAG, str(context)]
        with pytest.raises(EngineError, match="the build ended with status"):
            run_build(engine, arguments, dockerfile=dockerfile)
        assert "No space left on device" in capfd.readouterr().err
        assert not engine.exists(TAG)
    assert subprocess.run([docker, "ps", "--all", "--quiet"], capture_output=True, check=True).stdout == b""


def test_docker_without_space_for_a_layer_keeps_nothing_of_it(
    docker: str, small_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", small_engine)
    before = shutil.disk_usage(tmp_path / "data").used
    layer, image = large_image(300)
    with contextlib.closing(DockerEngine()) as engine:
        with pytest.raises(EngineError, match=f"cannot load '{TAG}'.*no space left on device") as raised:
            engine.load("scratch", [layer], image, TAG)
        assert raised.value.exit_code == 14
        assert not engine.exists(TAG)
    assert subprocess.run([docker, "images", "--all", "--quiet"], capture_output=True, check=True).stdout == b""
    assert shutil.disk_usage(tmp_path / "data").used < before + 5_000_000


def test_podman_without_space_keeps_nothing(
    small_storage: Storage, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    context = large_context(tmp_path / "context", 150)
    with contextlib.closing(PodmanEngine()) as engine:
        before = shutil.disk_usage(small_storage.root).used
        layer, image = large_image(150)
        with pytest.raises(EngineError, match=f"(?s)cannot load '{TAG}'.*no space left on device"):
            engine.load("scratch", [layer], image, TAG)
        assert not engine.exists(TAG)
        assert small_storage.spooled() == []
        assert shutil.disk_usage(small_storage.root).used < before + 5_000_000
        with pytest.raises(EngineError, match="the build ended with status"):
            run_build(engine, ["--network=none", "--tag", TAG, str(context)])
        assert "No space left on device" in capfd.readouterr().err
        assert not engine.exists(TAG)
        # This image fits on the disk, but the file that its container writes does not.
        (context / "Dockerfile").write_text('FROM scratch\nCOPY root /\nCOPY block /\nENTRYPOINT ["sh", "-c"]\n')
        run_build(engine, ["--network=none", "--tag", TAG, str(context)])
        out = tmp_path / "out"
        out.mkdir()
        command = ["while cat /block; do :; done > /noise; exit 3"]
        export = (PurePosixPath("/noise"), out)
        with pytest.raises(EngineError, match=r"no space left on device: the disk of podman's storage, .*, is full"):
            engine.run(ContainerRun(image=TAG, command=command, isolated=False, export=export))
        assert list(out.iterdir()) == []
        listed = subprocess.run(["podman", "ps", "--all", "--format", "json"], capture_output=True, check=True)
        assert json.loads(listed.stdout) == []
