"""Layers, layouts, archives, and images that are made of others; everything but an engine and a registry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from chatterbox_prewarm.errors import BadInputError, EngineError, IntegrityError, WeightsError
from chatterbox_prewarm.image.append import send
from chatterbox_prewarm.image.compose import Change, add_layers, resolve
from chatterbox_prewarm.image.docker_archive import Archive, save_archive
from chatterbox_prewarm.image.layer import Layer, pack, weight_layers
from chatterbox_prewarm.image.oci import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Descriptor,
    Document,
    digest_of,
    dump,
    to_documents,
)
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.weights.record import record
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.helpers.images import make_base, make_bases, tar_of
from tests.helpers.states import make_checkpoint, make_state

CREATED = "2025-01-02T03:04:05+00:00"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def layer(tmp_path: Path) -> Layer:
    make_state(tmp_path / "warm", {"numba": {"a.nbc": b"code", "deep/b.nbi": b"index"}})
    return pack(tmp_path / "warm", tmp_path / "layer.tar.gz")


def test_a_state_packs_to_the_same_bytes_on_another_path_with_other_times_rights_and_owners(tmp_path: Path) -> None:
    layers = []
    for number, mode in enumerate((0o644, 0o400)):
        warm = tmp_path / f"place {number}" / "warm"
        warm.parent.mkdir()
        make_state(warm, {"numba": {"b": b"2", "a": b"1"}})
        for path in warm.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            if os.geteuid() == 0:
                os.chown(path, 1000 + number, 1000 + number)
            os.utime(path, (number, number))
        layers.append(pack(warm, tmp_path / f"{number}.tar.gz"))
    assert (tmp_path / "0.tar.gz").read_bytes() == (tmp_path / "1.tar.gz").read_bytes()
    assert layers[0].digest == layers[1].digest
    content = (tmp_path / "0.tar.gz").read_bytes()
    assert layers[0].digest == hashlib.sha256(content).hexdigest()
    assert layers[0].diff_id == hashlib.sha256(gzip.decompress(content)).hexdigest()
    assert layers[0].size == len(content)


def test_a_layer_holds_files_and_folders_of_root_that_nobody_can_write(layer: Layer) -> None:
    with layer.opened() as stream, tarfile.open(fileobj=stream, mode="r:gz") as tar:
        members = tar.getmembers()
        place = f"opt/chatterbox-prewarm/{layer.title.replace('warm state ', 'warm/')}"
        assert [one.name for one in members] == [
            "opt",
            "opt/chatterbox-prewarm",
            "opt/chatterbox-prewarm/warm",
            place,
            f"{place}/manifest.json",
            f"{place}/numba",
            f"{place}/numba/a.nbc",
            f"{place}/numba/deep",
            f"{place}/numba/deep/b.nbi",
        ]
        assert {(one.uid, one.gid, one.mtime, one.uname, one.gname) for one in members} == {(0, 0, 0, "", "")}
        assert {one.mode for one in members if one.isfile()} == {0o444}
        assert [one.mode for one in members if one.isdir()] == [0o755, 0o755, 0o755, 0o555, 0o555, 0o555]


def test_what_packed_a_layer_is_in_the_digest_of_its_image(layer: Layer, layout: Layout) -> None:
    image = add_layers(make_base(layout, "base"), [layer], Change(), created=CREATED)
    packer = image.layers[-1].annotations["io.chatterbox-prewarm.packer"]
    assert packer.startswith("tar pax; gzip 6 in members of 1048576; zlib ")
    assert packer.encode() in to_documents(image)[0].raw


def test_a_broken_state_is_not_packed(tmp_path: Path) -> None:
    make_state(tmp_path / "warm", {"numba": {"a": b"1"}})
    (tmp_path / "warm" / "numba" / "a").write_bytes(b"2")
    with pytest.raises(IntegrityError, match="numba/a"):
        pack(tmp_path / "warm", tmp_path / "layer.tar.gz")
    assert not (tmp_path / "layer.tar.gz").exists()


def test_weights_are_layers_that_are_made_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights")
    record(checkpoint, variant=ENGLISH, repository="own", revision="1")
    sizes = {name: (checkpoint / name).stat().st_size for name in ENGLISH.files}
    largest = max(sizes, key=lambda name: sizes[name])
    monkeypatch.setattr("chatterbox_prewarm.image.layer._LARGE", sizes[largest])
    layers = weight_layers(checkpoint)
    names = []
    for one in layers:
        for _ in range(2):  # as often as it is asked for
            with one.opened() as stream:
                content = stream.read()
            assert hashlib.sha256(content).hexdigest() == one.digest == one.diff_id
            assert len(content) == one.size
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            files = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            assert {member.mode for member in files.values()} == {0o444}
            for name, member in files.items():
                extracted = tar.extractfile(member)
                assert extracted is not None
                assert extracted.read() == (checkpoint / name).read_bytes()
            names.append(set(files))
    large = {name for name, size in sizes.items() if size == sizes[largest]}
    assert names[1:] == [{name} for name in sorted(large)]
    assert names[0] == {*ENGLISH.files, "weights.json"} - large


def test_weights_that_are_not_as_recorded_are_no_layer(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights")
    record(checkpoint, variant=ENGLISH, repository="own", revision="1")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="tokenizer"):
        weight_layers(checkpoint)


def test_an_image_gets_layers_labels_environment_and_commands(layer: Layer, layout: Layout) -> None:
    base = make_base(layout, "base")
    change = Change(labels={"new": "1"}, environment={"A": "2", "B": "3"}, entrypoint=["python"], command=["serve"])
    image = add_layers(base, [layer], change, created=CREATED)
    settings = image.config["config"]
    assert settings["Labels"] == {"kept": "yes", "new": "1"}
    assert settings["Env"] == ["PATH=/bin", "A=2", "B=3"]
    assert (settings["Entrypoint"], settings["Cmd"]) == (["python"], ["serve"])
    assert image.diff_ids == (*base.diff_ids, f"sha256:{layer.diff_id}")
    assert [entry["created_by"] for entry in image.config["history"]] == [
        "base",
        f"chatterbox-prewarm append: {layer.title}",
    ]
    assert image.config["created"] == CREATED
    assert base.config["config"]["Env"] == ["PATH=/bin", "A=1"], "the base is as it was"
    assert to_documents(image) == to_documents(add_layers(base, [layer], change, created=CREATED))


def test_a_command_stays_when_nothing_is_said_of_it(layout: Layout) -> None:
    image = add_layers(make_base(layout, "base"), [], Change(), created=CREATED)
    assert image.config["config"]["Cmd"] == ["sh"]
    assert "Entrypoint" not in image.config["config"]


def test_only_blobs_that_are_missing_are_sent(layer: Layer, layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(labels={"n": "1"}), created=CREATED)
    target = Layout(tmp_path / "target")
    first = send(image, layout, [layer], target, "warm")
    assert first.blobs_sent == 3, "the base's layer, ours, the configuration"
    other = add_layers(base, [layer], Change(labels={"n": "2"}), created=CREATED)
    second = send(other, layout, [layer], target, "other")
    assert second.blobs_sent == 1, "the configuration alone"
    assert resolve(target, "warm", platform="linux/amd64") == image
    assert resolve(target, "other", platform="linux/amd64") == other
    names = {path.name for path in (tmp_path / "target").rglob("*") if path.is_file()} - {".lock"}
    assert not [name for name in names if name.startswith(".")], "nothing half-written stays"


def test_a_tag_that_exists_is_taken_on_request_alone(layer: Layer, layout: Layout) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(), created=CREATED)
    before = layout.read_manifest("base")
    with pytest.raises(BadInputError, match="'base' already"):
        send(image, layout, [layer], layout, "base")
    assert layout.read_manifest("base") == before
    send(image, layout, [layer], layout, "base", replacing=True)
    assert resolve(layout, "base", platform="linux/amd64") == image
    assert layout.read_manifest(before.digest) == before, "what had the tag stays under its digest"


def test_of_an_index_the_image_for_the_platform_is_taken(layout: Layout) -> None:
    entries = make_bases(layout, "amd64", "arm64")
    attestation = {**entries[0], "platform": {"os": "unknown", "architecture": "unknown"}}
    index = dump({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [attestation, *entries]})
    layout.put_manifest(Document(media_type=OCI_INDEX, raw=index), "both")
    assert resolve(layout, "both", platform="linux/arm64").platform == "linux/arm64"
    assert resolve(layout, "both", platform="linux/amd64/v3").platform == "linux/amd64"
    with pytest.raises(EngineError, match="only for: linux/amd64, linux/arm64"):
        resolve(layout, "both", platform="linux/riscv64")
    with pytest.raises(EngineError, match="linux/arm64, not for linux/amd64"):
        resolve(layout, "arm64", platform="linux/amd64")


def test_a_blob_that_is_not_what_was_promised_is_not_stored(layout: Layout) -> None:
    make_base(layout, "base")
    before = sorted(path for path in layout.path.rglob("*"))
    wrong = Descriptor(media_type=OCI_CONFIG, digest=digest_of(b"right"), size=5)
    with pytest.raises(EngineError, match="was to be stored"):
        layout.put_blob(wrong, lambda: nullcontext(io.BytesIO(b"wrong")))
    assert sorted(path for path in layout.path.rglob("*")) == before


def test_a_changed_blob_of_a_layout_is_not_read(layout: Layout) -> None:
    make_base(layout, "base")
    digest = layout.read_manifest("base").digest
    (layout.path / "blobs" / "sha256" / digest.removeprefix("sha256:")).write_bytes(b"{}")
    with pytest.raises(EngineError, match="was changed"):
        layout.read_manifest("base")


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "index.json").write_text("[]"),
        lambda root: (root / "index.json").write_text('{"manifests": [{"digest": "sha256:../../x"}]}'),
        lambda root: (root / "index.json").write_text("{"),
    ],
)
def test_a_broken_index_is_said(layout: Layout, damage: Any) -> None:
    make_base(layout, "base")
    damage(layout.path)
    with pytest.raises(EngineError, match="no index of images"):
        layout.read_manifest("base")


def test_a_folder_with_something_else_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EngineError, match="no OCI image layout"):
        Layout(tmp_path)


def test_a_full_disk_leaves_no_blob(layer: Layer, layout: Layout, small_disk: Path) -> None:
    base = make_base(layout, "base")
    large = b"x" * 100_000
    big = Layer(
        digest=hashlib.sha256(large).hexdigest(),
        diff_id=hashlib.sha256(large).hexdigest(),
        size=len(large),
        media_type=OCI_LAYER,
        packer="none",
        title="large",
        opened=lambda: nullcontext(io.BytesIO(large)),
    )
    image = add_layers(base, [layer, big], Change(), created=CREATED)
    target = Layout(small_disk / "target")
    with pytest.raises(BadInputError, match="No space left"):
        send(image, layout, [layer, big], target, "warm")
    assert not target.has_manifest("warm")
    assert [path for path in small_disk.rglob(".*") if path.name != ".lock"] == []


def test_an_archive_is_read_as_it_was_written(layer: Layer, layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    path = tmp_path / "image.tar"
    blobs = {base.layers[0].digest: lambda: layout.open_blob(base.layers[0])}
    save_archive(base, "some/name:tag", blobs, path)
    archive = Archive(path)
    found = resolve(archive, "some/name:tag", platform="linux/amd64")
    assert found.config == base.config
    assert resolve(archive, "", platform="linux/amd64") == found, "an archive's one image needs no name"
    target = Layout(tmp_path / "target")
    image = add_layers(found, [layer], Change(), created=CREATED)
    assert send(image, archive, [layer], target, "warm").blobs_sent == 3
    with pytest.raises(EngineError, match="choose one it has: some/name:tag"):
        archive.read_manifest("other:tag")


def test_compressed_layers_come_out_of_an_archive_as_they_went_in(layer: Layer, layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(), created=CREATED)
    path = tmp_path / "image.tar"
    blobs = {base.layers[0].digest: lambda: layout.open_blob(base.layers[0]), f"sha256:{layer.digest}": layer.opened}
    save_archive(image, "some:tag", blobs, path)
    archive = Archive(path)
    found = resolve(archive, "some:tag", platform="linux/amd64")
    assert found.config == image.config
    assert [(one.media_type, one.digest, one.size) for one in found.layers] == [
        (one.media_type, one.digest, one.size) for one in image.layers
    ]
    target = Layout(tmp_path / "target")
    assert send(found, archive, [], target, "warm").blobs_sent == 3
    with target.open_blob(found.layers[-1]) as stream:
        assert f"sha256:{hashlib.sha256(gzip.decompress(stream.read())).hexdigest()}" == found.diff_ids[-1]


@pytest.mark.parametrize(
    ("content", "media_type"),
    [(gzip.compress(b"a layer", mtime=0), OCI_LAYER_GZIP), (b"\x28\xb5\x2f\xfd and more", OCI_LAYER_ZSTD)],
)
def test_a_compressed_layer_whose_name_is_no_digest_is_read_for_it(
    content: bytes, media_type: str, tmp_path: Path
) -> None:
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(b"plain")]}}
    listed = [{"Config": "config.json", "RepoTags": ["some:tag"], "Layers": ["1/layer.tar"]}]
    files = {"manifest.json": json.dumps(listed).encode(), "config.json": dump(config), "1/layer.tar": content}
    (tmp_path / "image.tar").write_bytes(tar_of(files))
    archive = Archive(tmp_path / "image.tar")
    (found,) = resolve(archive, "some:tag", platform="linux/amd64").layers
    assert found == Descriptor(media_type=media_type, digest=digest_of(content), size=len(content))
    with archive.open_blob(found) as stream:
        assert stream.read() == content


def test_a_large_compressed_layer_of_an_archive_is_not_held_in_memory(tmp_path: Path) -> None:
    content = gzip.compress(b"", mtime=0) + bytes(64 << 20)
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(b"plain")]}}
    listed = [{"Config": "config.json", "RepoTags": ["some:tag"], "Layers": ["1/layer.tar"]}]
    files = {"manifest.json": json.dumps(listed).encode(), "config.json": dump(config), "1/layer.tar": content}
    (tmp_path / "image.tar").write_bytes(tar_of(files))
    del files
    tracemalloc.start()
    try:
        archive = Archive(tmp_path / "image.tar")
        (found,) = resolve(archive, "some:tag", platform="linux/amd64").layers
        Layout(tmp_path / "target").put_blob(found, lambda: archive.open_blob(found))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.digest == digest_of(content)
    assert peak < 8 << 20


def test_a_blob_that_changed_on_the_way_is_no_archive(layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    path = tmp_path / "image.tar"
    wrong = b"\0" * base.layers[0].size
    with pytest.raises(EngineError, match="another content"):
        save_archive(base, "some:tag", {base.layers[0].digest: lambda: nullcontext(io.BytesIO(wrong))}, path)
    assert list(tmp_path.glob("*image.tar*")) == []


@pytest.mark.parametrize("content", [b"", b"not a tar", tar_of({"manifest.json": b"{}"}), tar_of({"other": b""})])
def test_what_is_no_archive_is_said(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(content)
    with pytest.raises(EngineError, match="no archive of `docker save`"):
        Archive(tmp_path / "image.tar")


def test_manifests_that_are_none_are_said(layout: Layout) -> None:
    make_base(layout, "base")
    raw = json.loads(layout.read_manifest("base").raw)
    changes: list[dict[str, Any]] = [
        {"layers": "all"},
        {"layers": []},
        {"config": {"digest": "sha256:short"}},
        {"config": None},
    ]
    for change in changes:
        layout.put_manifest(Document(media_type=raw["mediaType"], raw=dump({**raw, **change})), "broken")
        with pytest.raises(EngineError):
            resolve(layout, "broken", platform="linux/amd64")
