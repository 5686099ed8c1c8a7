"""The states of a plain `docker build` are read from its layers, because its labels do not describe them."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import EngineError, IntegrityError
from chatterbox_prewarm.image import image_states
from chatterbox_prewarm.image.compose import Change, add_layers
from chatterbox_prewarm.image.docker_archive import save_archive
from chatterbox_prewarm.image.engines.engine import check_status
from chatterbox_prewarm.image.image_states import image_with_states, with_states
from chatterbox_prewarm.image.labels import PREFIX, STATES, image_labels, read_states
from chatterbox_prewarm.image.oci import OCI_LAYER, Descriptor, Image, digest_of
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from tests.conftest import run_cli
from tests.helpers.images import layer_of, make_base
from tests.helpers.states import make_state_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatterbox_prewarm.image.engines.engine import ContainerRun
    from chatterbox_prewarm.state.manifest import Manifest

WARM = "opt/chatterbox-prewarm/warm"
FACTS = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9"}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def make_manifest_file(folder: Path, **facts: str) -> tuple[Manifest, bytes]:
    manifest = make_state_for(folder, {**FACTS, **facts})
    return manifest, (folder / "manifest.json").read_bytes()


def build(layout: Layout, *layers: Mapping[str, bytes], profile: bool = True) -> Image:
    """Return an image with these layers, lowest first, and with the labels of a plain build."""
    added = [layer_of(files) for files in layers]
    for layer in added:
        layout.put_blob(layer.descriptor, layer.open)
    labels = {f"{PREFIX}profile": "aot"} if profile else {}
    return add_layers(make_base(layout, "base"), added, Change(labels=labels), created="2025-01-02T03:04:05+00:00")


def test_the_state_of_a_plain_build_gets_the_labels_that_append_would_set(layout: Layout, tmp_path: Path) -> None:
    manifest, content = make_manifest_file(tmp_path / "warm")
    image = build(
        layout,
        {f"{WARM}/aot/manifest.json": b"of a package", f"{WARM}/manifest.json": content},
        {"app/derived": b"a layer of the user"},
    )
    labels = with_states(layout, image).labels
    assert labels.items() >= image_labels([manifest]).items()
    assert labels["kept"] == "yes"


def test_the_states_of_an_image_in_an_archive_are_read(layout: Layout, tmp_path: Path) -> None:
    manifest, content = make_manifest_file(tmp_path / "warm")
    image = build(layout, {f"{WARM}/manifest.json": content})
    blobs = {layer.digest: partial(layout.open_blob, layer) for layer in image.layers}
    save_archive(image, "acme/x:1", blobs, tmp_path / "image.tar")
    for name in (":acme/x:1", ""):
        reference = parse(f"docker-archive:{tmp_path}/image.tar{name}")
        digest, found = image_with_states(reference, platform="linux/amd64", insecure=None)
        assert digest.startswith("sha256:")
        assert found.labels.items() >= image_labels([manifest]).items()


def test_the_states_of_a_folder_of_several_are_found(layout: Layout, tmp_path: Path) -> None:
    _, l4 = make_manifest_file(tmp_path / "l4")
    _, h100 = make_manifest_file(tmp_path / "h100", gpu="NVIDIA H100 80GB HBM3", compute_capability="9.0")
    image = build(layout, {f"./{WARM}/l4/manifest.json": l4, f"./{WARM}/h100/manifest.json": h100})
    assert {one.gpu for one in read_states(with_states(layout, image).labels)} == {"NVIDIA L4", "NVIDIA H100 80GB HBM3"}


class _Engine:
    """An engine whose containers have this folder of states. A real one needs an image with the packages."""

    def __init__(self, image: Image, warm: Path) -> None:
        self._image, self._warm = image, warm

    def close(self) -> None:
        pass

    def exists(self, _: str) -> bool:
        return True

    def image(self, _: str) -> Image:
        return self._image

    def run(self, container: ContainerRun) -> tuple[int, str]:
        done = run_cli(*container.command, "--warm", self._warm)
        check_status(done.returncode, container.allowed, done.stderr)
        return done.returncode, done.stdout


@pytest.mark.parametrize("gpus", [["NVIDIA L4"], ["NVIDIA L4", "NVIDIA H100"]])
def test_the_states_of_a_plain_build_are_read_from_the_local_engine(
    gpus: list[str], layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu in gpus:
        make_manifest_file(tmp_path / "warm" / gpu.replace(" ", "-"), gpu=gpu)
    engine = _Engine(build(layout, {"app/code": b"code"}), tmp_path / "warm")
    monkeypatch.setattr(image_states, "connect", lambda: engine)
    # Nothing listens on this port, so the image is read from the engine.
    digest, found = image_with_states(parse("127.0.0.1:1/speech:1"), platform="linux/amd64", insecure=None)
    assert digest == ""
    assert sorted(state.gpu for state in read_states(found.labels)) == sorted(gpus)


def test_labels_take_precedence_and_other_images_are_not_read(layout: Layout, tmp_path: Path) -> None:
    _, content = make_manifest_file(tmp_path / "warm")
    unrelated = build(layout, {f"{WARM}/manifest.json": content}, profile=False)
    assert with_states(layout, unrelated) is unrelated
    labelled = add_layers(unrelated, [], Change(labels={STATES: "{}", f"{PREFIX}profile": "aot"}), created="")
    assert with_states(layout, labelled) is labelled


def test_an_image_without_a_state_and_large_layers_are_left_alone(layout: Layout, tmp_path: Path) -> None:
    image = build(layout, {"app/code": b"code"})
    with pytest.raises(EngineError, match="has no label"):
        read_states(with_states(layout, image).labels)
    _, content = make_manifest_file(tmp_path / "warm")
    built = build(layout, {f"{WARM}/manifest.json": content})
    huge = replace(built, layers=(*built.layers[:-1], replace(built.layers[-1], size=1 << 30)))
    assert with_states(layout, huge) is huge


def test_a_damaged_manifest_or_layer_is_refused(layout: Layout, tmp_path: Path) -> None:
    _, content = make_manifest_file(tmp_path / "warm")
    with pytest.raises(IntegrityError, match=r"manifest\.json in the layer sha256:"):
        with_states(layout, build(layout, {f"{WARM}/manifest.json": content.replace(b"x86_64", b"x86_65")}))
    image = build(layout, {f"{WARM}/manifest.json": content})
    raw = b"not a tar" * 100
    layer = Descriptor(media_type=OCI_LAYER, digest=digest_of(raw), size=len(raw))
    layout.put_blob(layer, lambda: io.BytesIO(raw))
    with pytest.raises(EngineError, match="cannot be read: ReadError"):
        with_states(layout, replace(image, layers=(*image.layers, layer)))
