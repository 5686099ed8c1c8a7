"""Layers, OCI layouts, Docker archives and composed images, without an engine or a registry."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chatterbox_prewarm.errors import BadInputError, EngineError, IntegrityError, WeightsError
from chatterbox_prewarm.image.append import AppendOptions, send
from chatterbox_prewarm.image.attest import attach_evidence
from chatterbox_prewarm.image.compose import Change, add_layers, resolve
from chatterbox_prewarm.image.docker_archive import Archive, save_archive
from chatterbox_prewarm.image.layer import Layer, pack, weight_layers
from chatterbox_prewarm.image.oci import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    Descriptor,
    Document,
    digest_of,
    dump,
    image_index,
    to_documents,
)
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.state.state import State
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
    return pack(State.open(tmp_path / "warm"), tmp_path / "layer.tar.gz")


def test_a_packed_state_does_not_depend_on_path_times_permissions_or_groups(tmp_path: Path) -> None:
    layers = []
    for number, mode in enumerate((0o644, 0o400)):
        warm = tmp_path / f"folder {number}" / "warm"
        warm.parent.mkdir()
        make_state(warm, {"numba": {"b": b"2", "a": b"1"}})
        for path in warm.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            if os.geteuid() == 0:
                os.chown(path, 0, 1000 + number)
            os.utime(path, (number, number))
        layers.append(pack(State.open(warm), tmp_path / f"{number}.tar.gz"))
    assert (tmp_path / "0.tar.gz").read_bytes() == (tmp_path / "1.tar.gz").read_bytes()
    assert layers[0].digest == layers[1].digest
    content = (tmp_path / "0.tar.gz").read_bytes()
    assert layers[0].digest == hashlib.sha256(content).hexdigest()
    assert layers[0].diff_id == hashlib.sha256(gzip.decompress(content)).hexdigest()
    assert layers[0].size == len(content)


def test_a_layer_contains_files_of_root_that_are_not_writable(layer: Layer) -> None:
    with layer.open() as stream, tarfile.open(fileobj=stream, mode="r:gz") as tar:
        members = tar.getmembers()
        folder = f"opt/chatterbox-prewarm/{layer.title.replace('warm state ', 'warm/')}"
        assert [one.name for one in members] == [
            "opt",
            "opt/chatterbox-prewarm",
            "opt/chatterbox-prewarm/warm",
            folder,
            f"{folder}/manifest.json",
            f"{folder}/numba",
            f"{folder}/numba/a.nbc",
            f"{folder}/numba/deep",
            f"{folder}/numba/deep/b.nbi",
        ]
        assert {(one.uid, one.gid, one.mtime, one.uname, one.gname) for one in members} == {(0, 0, 0, "", "")}
        assert {one.mode for one in members if one.isfile()} == {0o444}
        assert [one.mode for one in members if one.isdir()] == [0o755, 0o755, 0o755, 0o555, 0o555, 0o555]


def test_the_packer_is_part_of_the_digest_of_the_image(layer: Layer, layout: Layout) -> None:
    image = add_layers(make_base(layout, "base"), [layer], Change(), created=CREATED)
    packer = image.layers[-1].annotations["io.chatterbox-prewarm.packer"]
    assert packer.startswith("tar pax; gzip 6 in members of 1048576; zlib ")
    assert packer.encode() in to_documents(image)[0].raw


def test_a_damaged_state_is_not_packed(tmp_path: Path) -> None:
    make_state(tmp_path / "warm", {"numba": {"a": b"1"}})
    (tmp_path / "warm" / "numba" / "a").write_bytes(b"2")
    with pytest.raises(IntegrityError, match="numba/a"):
        pack(State.open(tmp_path / "warm"), tmp_path / "layer.tar.gz")
    assert not (tmp_path / "layer.tar.gz").exists()


def test_layers_of_weights_are_generated_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights")
    record(checkpoint, variant=ENGLISH, repository="own", revision="1")
    sizes = {name: (checkpoint / name).stat().st_size for name in ENGLISH.files}
    largest = max(sizes, key=lambda name: sizes[name])
    monkeypatch.setattr("chatterbox_prewarm.image.layer._LARGE", sizes[largest])
    layers = weight_layers(checkpoint)
    names = []
    for one in layers:
        for _ in range(2):  # a layer can be opened again
            with one.open() as stream:
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


def test_a_layer_has_an_entry_for_each_folder_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights")
    (checkpoint / "words" / "model").mkdir(parents=True)
    (checkpoint / "words" / "model" / "features").write_bytes(b"features")
    variant = replace(ENGLISH, data=("words/model/features",))
    monkeypatch.setattr("chatterbox_prewarm.weights.record.get_variant", lambda _: variant)
    record(checkpoint, variant=variant, repository="own", revision="-")
    (layer,) = weight_layers(checkpoint)
    with layer.open() as stream, tarfile.open(fileobj=io.BytesIO(stream.read())) as tar:
        found = {member.name: (member.isdir(), member.mode) for member in tar.getmembers()}
    folder = "opt/chatterbox-prewarm/weights/words"
    assert found[folder] == found[f"{folder}/model"] == (True, 0o755)
    assert found[f"{folder}/model/features"] == (False, 0o444)


def test_weights_that_differ_from_their_record_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "weights")
    record(checkpoint, variant=ENGLISH, repository="own", revision="1")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="tokenizer"):
        weight_layers(checkpoint)


def test_layers_labels_environment_and_commands_are_added_to_an_image(layer: Layer, layout: Layout) -> None:
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
    assert base.config["config"]["Env"] == ["PATH=/bin", "A=1"], "the base is unchanged"
    assert to_documents(image) == to_documents(add_layers(base, [layer], change, created=CREATED))


def test_the_command_of_the_base_is_kept_by_default(layout: Layout) -> None:
    image = add_layers(make_base(layout, "base"), [], Change(), created=CREATED)
    assert image.config["config"]["Cmd"] == ["sh"]
    assert "Entrypoint" not in image.config["config"]


def test_only_missing_blobs_are_sent(layer: Layer, layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(labels={"n": "1"}), created=CREATED)
    target = Layout(tmp_path / "target")
    first = send(image, layout, [layer], target, "warm")
    assert first.blobs_sent == 3, "the layer of the base, the new layer, the configuration"
    other = add_layers(base, [layer], Change(labels={"n": "2"}), created=CREATED)
    second = send(other, layout, [layer], target, "other")
    assert second.blobs_sent == 1, "only the configuration"
    assert resolve(target, "warm", platform="linux/amd64") == image
    assert resolve(target, "other", platform="linux/amd64") == other
    names = {path.name for path in (tmp_path / "target").rglob("*") if path.is_file()} - {".lock"}
    assert not [name for name in names if name.startswith(".")], "no partial file is left"


def test_an_existing_tag_is_only_replaced_on_request(layer: Layer, layout: Layout) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(), created=CREATED)
    before = layout.read_manifest("base")
    with pytest.raises(BadInputError, match="'base' already"):
        send(image, layout, [layer], layout, "base")
    assert layout.read_manifest("base") == before
    send(image, layout, [layer], layout, "base", AppendOptions(replacing=True))
    assert resolve(layout, "base", platform="linux/amd64") == image
    assert layout.read_manifest(before.digest) == before, "the replaced image is kept under its digest"


def test_the_image_for_the_platform_is_chosen_from_an_index(layout: Layout) -> None:
    entries = make_bases(layout, "amd64", "arm64")
    attestation = {**entries[0], "platform": {"os": "unknown", "architecture": "unknown"}}
    layout.put_manifest(image_index([attestation, *entries]), "both")
    assert resolve(layout, "both", platform="linux/arm64").platform == "linux/arm64"
    assert resolve(layout, "both", platform="linux/amd64/v3").platform == "linux/amd64"
    with pytest.raises(EngineError, match="only for: linux/amd64, linux/arm64"):
        resolve(layout, "both", platform="linux/riscv64")
    with pytest.raises(EngineError, match="linux/arm64, not for linux/amd64"):
        resolve(layout, "arm64", platform="linux/amd64")


def test_a_blob_that_differs_from_its_descriptor_is_not_stored(layout: Layout) -> None:
    make_base(layout, "base")
    before = sorted(layout.path.rglob("*"))
    wrong = Descriptor(media_type=OCI_CONFIG, digest=digest_of(b"right"), size=5)
    with pytest.raises(EngineError, match="was not stored"):
        layout.put_blob(wrong, lambda: io.BytesIO(b"wrong"))
    assert sorted(layout.path.rglob("*")) == before


def test_a_changed_blob_of_a_layout_is_refused(layout: Layout) -> None:
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
def test_a_malformed_index_of_a_layout_is_refused(layout: Layout, damage: Any) -> None:
    make_base(layout, "base")
    damage(layout.path)
    with pytest.raises(EngineError, match="not an index of images"):
        layout.read_manifest("base")


def test_a_folder_with_other_files_is_not_used_as_a_layout(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EngineError, match="not an OCI image layout"):
        Layout(tmp_path)


def test_a_layout_whose_first_write_was_interrupted_is_used_by_the_next_run(
    layer: Layer, layout: Layout, tmp_path: Path
) -> None:
    def fail() -> Any:
        raise KeyboardInterrupt

    image = add_layers(make_base(layout, "base"), [layer], Change(), created=CREATED)
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        send(image, layout, [replace(layer, open=fail)], Layout(target), "warm")
    send(image, layout, [layer], Layout(target), "warm")
    assert resolve(Layout(target), "warm", platform="linux/amd64") == image
    assert json.loads((target / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}


def test_a_folder_that_has_only_blobs_of_an_older_version_is_used_as_a_layout(tmp_path: Path) -> None:
    (tmp_path / "old" / "blobs" / "sha256").mkdir(parents=True)
    (tmp_path / "old" / ".oci-layout.01234567").touch()
    make_base(Layout(tmp_path / "old"), "base")
    assert Layout(tmp_path / "old").has_manifest("base")
    (tmp_path / "other" / "blobs" / "photos").mkdir(parents=True)
    with pytest.raises(EngineError, match="not an OCI image layout"):
        Layout(tmp_path / "other")


def test_a_tag_that_another_process_sets_during_the_transfer_is_not_replaced(layer: Layer, layout: Layout) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(), created=CREATED)

    class Raced(Layout):
        """A layout in which another process sets the tag after all checks outside the lock."""

        def put_manifest(self, document: Document, reference: str, **options: Any) -> None:
            make_base(layout, reference)
            super().put_manifest(document, reference, **options)

    before = layout.read_manifest("base")
    with pytest.raises(BadInputError, match="'warm' already"):
        send(image, layout, [layer], Raced(layout.path), "warm")
    assert layout.read_manifest("warm") == before


def test_the_tag_of_a_layout_is_checked_under_its_lock(layout: Layout) -> None:
    make_base(layout, "base")
    checked = []

    def check() -> None:
        with (layout.path / ".lock").open("r") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        checked.append(True)

    layout.put_manifest(layout.read_manifest("base"), "other", check=check)
    assert checked


def test_a_full_disk_leaves_no_partial_blob(layer: Layer, layout: Layout, small_disk: Path) -> None:
    base = make_base(layout, "base")
    large = b"x" * 100_000
    big = Layer(
        digest=hashlib.sha256(large).hexdigest(),
        diff_id=hashlib.sha256(large).hexdigest(),
        size=len(large),
        media_type=OCI_LAYER,
        packer="none",
        title="large",
        open=lambda: io.BytesIO(large),
    )
    image = add_layers(base, [layer, big], Change(), created=CREATED)
    target = Layout(small_disk / "target")
    with pytest.raises(BadInputError, match="No space left"):
        send(image, layout, [layer, big], target, "warm")
    assert not target.has_manifest("warm")
    assert [path for path in small_disk.rglob(".*") if path.name != ".lock"] == []


def test_an_archive_is_read_back_unchanged(layer: Layer, layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    path = tmp_path / "image.tar"
    blobs = {base.layers[0].digest: lambda: layout.open_blob(base.layers[0])}
    save_archive(base, "some/name:tag", blobs, path)
    archive = Archive(path)
    loaded = resolve(archive, "some/name:tag", platform="linux/amd64")
    assert loaded.config == base.config
    assert resolve(archive, "", platform="linux/amd64") == loaded, "the only image of an archive needs no name"
    target = Layout(tmp_path / "target")
    image = add_layers(loaded, [layer], Change(), created=CREATED)
    assert send(image, archive, [layer], target, "warm").blobs_sent == 3
    with pytest.raises(EngineError, match="choose one that it has: some/name:tag"):
        archive.read_manifest("other:tag")


def test_an_archive_is_read_only(layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    path = tmp_path / "image.tar"
    save_archive(base, "some:tag", {base.layers[0].digest: lambda: layout.open_blob(base.layers[0])}, path)
    with pytest.raises(BadInputError, match="cannot be changed"):
        Archive(path).put_manifest(layout.read_manifest("base"), "some:tag")


def test_compressed_layers_of_an_archive_are_read_back_unchanged(layer: Layer, layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    image = add_layers(base, [layer], Change(), created=CREATED)
    path = tmp_path / "image.tar"
    blobs = {base.layers[0].digest: lambda: layout.open_blob(base.layers[0]), f"sha256:{layer.digest}": layer.open}
    save_archive(image, "some:tag", blobs, path)
    archive = Archive(path)
    loaded = resolve(archive, "some:tag", platform="linux/amd64")
    assert loaded.config == image.config
    assert [(one.media_type, one.digest, one.size) for one in loaded.layers] == [
        (one.media_type, one.digest, one.size) for one in image.layers
    ]
    target = Layout(tmp_path / "target")
    assert send(loaded, archive, [], target, "warm").blobs_sent == 3
    with target.open_blob(loaded.layers[-1]) as stream:
        assert f"sha256:{hashlib.sha256(gzip.decompress(stream.read())).hexdigest()}" == loaded.diff_ids[-1]


@pytest.mark.parametrize(
    ("content", "media_type"),
    [(gzip.compress(b"a layer", mtime=0), OCI_LAYER_GZIP), (b"\x28\xb5\x2f\xfd and more", OCI_LAYER_ZSTD)],
)
def test_the_digest_of_a_compressed_layer_is_computed_if_its_name_has_none(
    content: bytes, media_type: str, tmp_path: Path
) -> None:
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(b"plain")]}}
    listed = [{"Config": "config.json", "RepoTags": ["some:tag"], "Layers": ["1/layer.tar"]}]
    files = {"manifest.json": json.dumps(listed).encode(), "config.json": dump(config), "1/layer.tar": content}
    (tmp_path / "image.tar").write_bytes(tar_of(files))
    archive = Archive(tmp_path / "image.tar")
    (descriptor,) = resolve(archive, "some:tag", platform="linux/amd64").layers
    assert descriptor == Descriptor(media_type=media_type, digest=digest_of(content), size=len(content))
    with archive.open_blob(descriptor) as stream:
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
        (descriptor,) = resolve(archive, "some:tag", platform="linux/amd64").layers
        Layout(tmp_path / "target").put_blob(descriptor, lambda: archive.open_blob(descriptor))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert descriptor.digest == digest_of(content)
    assert peak < 8 << 20


def test_a_layer_that_changed_is_not_written_to_an_archive(layout: Layout, tmp_path: Path) -> None:
    base = make_base(layout, "base")
    path = tmp_path / "image.tar"
    wrong = b"\0" * base.layers[0].size
    with pytest.raises(EngineError, match="differs from its digest"):
        save_archive(base, "some:tag", {base.layers[0].digest: lambda: io.BytesIO(wrong)}, path)
    assert list(tmp_path.glob("*image.tar*")) == []


@pytest.mark.parametrize("content", [b"", b"not a tar", tar_of({"manifest.json": b"{}"}), tar_of({"other": b""})])
def test_a_file_that_is_not_an_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(content)
    with pytest.raises(EngineError, match="not an archive of `docker save`"):
        Archive(tmp_path / "image.tar")


def test_malformed_manifests_are_refused(layout: Layout) -> None:
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


def test_a_lock_file_of_a_layout_that_is_a_link_is_refused_and_its_target_is_kept(
    layout: Layout, tmp_path: Path
) -> None:
    make_base(layout, "base")
    document = layout.read_manifest("base")
    (tmp_path / "victim").write_text("precious")
    (layout.path / ".lock").unlink()
    (layout.path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(BadInputError, match=r"\.lock is not a lock file"):
        layout.put_manifest(document, "other")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_evidence_is_refused(layout: Layout, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "evidence.json")
    with pytest.raises(BadInputError, match="it is a pipe and not a regular file"):
        attach_evidence(layout, "base", tmp_path / "evidence.json")
