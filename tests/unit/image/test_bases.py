"""Base images in the forms that other tools write them, and damaged ones."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.image.compose import Change, add_layers, resolve
from chatterbox_prewarm.image.docker_archive import Archive, save_archive
from chatterbox_prewarm.image.labels import STATES, read_states
from chatterbox_prewarm.image.oci import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Document,
    digest_of,
    dump,
    image_index,
    to_documents,
)
from chatterbox_prewarm.image.oci_layout import Layout
from chatterbox_prewarm.image.references import parse
from chatterbox_prewarm.image.stores import open_store
from tests.helpers.images import layer_of, make_base, make_bases, tar_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


CREATED = "2025-01-02T03:04:05+00:00"
TAG = "org.opencontainers.image.ref.name"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def set_entries(layout: Layout, entries: list[dict[str, Any]]) -> None:
    """Replace the index of a layout, as another tool writes it."""
    (layout.path / "index.json").write_bytes(image_index(entries).raw)


def test_an_index_of_a_layout_may_have_its_images_only_as_blobs(layout: Layout) -> None:
    """`skopeo copy --all` and buildx store an index so. An attestation is not an image for a platform."""
    entries = make_bases(layout, "amd64", "arm64")
    attestation = {**entries[0], "platform": {"os": "unknown", "architecture": "unknown"}}
    layout.put_manifest(image_index([attestation, *entries]), "multi")
    set_entries(layout, [{**layout.read_manifest("multi").descriptor.to_json(), "annotations": {TAG: "multi"}}])
    assert resolve(layout, "multi", platform="linux/arm64").platform == "linux/arm64"
    assert layout.has_manifest(entries[0]["digest"])
    with pytest.raises(EngineError, match="has no image for linux/riscv64"):
        resolve(layout, "multi", platform="linux/riscv64")


@pytest.mark.parametrize("annotation", [TAG, "io.containerd.image.name"])
@pytest.mark.parametrize("stored", ["docker.io/acme/x:1", "acme/x:1", "index.docker.io/acme/x:1"])
def test_a_layout_finds_an_image_by_any_form_of_its_name(layout: Layout, annotation: str, stored: str) -> None:
    make_base(layout, "other")
    make_base(layout, "base", architecture="arm64")
    other, base = (layout.read_manifest(tag).descriptor.to_json() for tag in ("other", "base"))
    set_entries(layout, [{**other, "annotations": {TAG: "other"}}, {**base, "annotations": {annotation: stored}}])
    for name in ("docker.io/acme/x:1", "acme/x:1"):
        assert resolve(layout, name, platform="linux/arm64").platform == "linux/arm64"
    for name in ("acme/x", "x:1", "example.com/acme/x:1"):
        assert not layout.has_manifest(name)


def test_a_manifest_without_a_media_type_is_read(layout: Layout) -> None:
    make_base(layout, "base")
    raw = {name: value for name, value in json.loads(layout.read_manifest("base").raw).items() if name != "mediaType"}
    layout.put_manifest(Document(media_type=OCI_MANIFEST, raw=dump(raw)), "plain")
    assert resolve(layout, "plain", platform="linux/amd64") == resolve(layout, "base", platform="linux/amd64")


def test_an_oci_archive_is_refused_with_the_way_to_use_it(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(tar_of({"oci-layout": b"{}", "index.json": b"{}"}))
    with pytest.raises(EngineError, match="is an OCI archive") as refused:
        Archive(tmp_path / "image.tar")
    assert "oci:layout:TAG" in refused.value.next_step


@pytest.mark.parametrize("stored", ["docker.io/acme/x:1", "acme/x:1"])
def test_an_archive_finds_an_image_by_any_form_of_its_name(layout: Layout, tmp_path: Path, stored: str) -> None:
    base = make_base(layout, "base")
    openers = {layer.digest: partial(layout.open_blob, layer) for layer in base.layers}
    save_archive(base, stored, openers, tmp_path / "image.tar")
    for name in ("docker.io/acme/x:1", "acme/x:1"):
        with open_store(parse(f"docker-archive:{tmp_path}/image.tar:{name}")) as (store, reference):
            assert store.has_manifest(reference)


WRONG: tuple[Any, ...] = (None, 1, "text", [1], [["a", "b"]], {}, {"a": 1})


def damaged(document: Any) -> Iterator[Any]:
    """Yield the document with each of its values removed, or replaced by a value of another type."""
    for key in document if isinstance(document, dict) else range(len(document)):
        rest = document.copy()
        value = rest.pop(key)
        yield rest
        for replacement in (*WRONG, *(damaged(value) if isinstance(value, (dict, list)) else ())):
            changed = document.copy()
            changed[key] = replacement
            yield changed


def store(layout: Layout, document: Any) -> dict[str, Any]:
    """Store a document as a blob without the checks of `Layout`, and return its entry."""
    content = dump(document)
    digest = digest_of(content)
    (layout.path / "blobs" / digest.replace(":", "/")).write_bytes(content)
    return {"mediaType": OCI_CONFIG, "digest": digest, "size": len(content)}


def test_a_base_with_a_damaged_document_is_refused_or_used_but_is_not_a_bug(layout: Layout) -> None:
    layer = layer_of({"state": b"warm"})
    image = replace(make_base(layout, "base", Labels={"a": "b", STATES: "{}"}), annotations={"a": "b"})
    config = dict(image.config)
    manifest = json.loads(to_documents(image)[0].raw)
    platform = {"os": "linux", "architecture": "amd64"}
    manifests = [
        *({**manifest, "config": store(layout, one)} for one in damaged(config)),
        *damaged(manifest),
        *damaged(json.loads(image_index([{**store(layout, manifest), "platform": platform}]).raw)),
    ]
    results: Counter[str] = Counter()
    for one in manifests:
        set_entries(layout, [{**store(layout, one), "mediaType": OCI_MANIFEST}])
        try:
            base = resolve(layout, "base", platform="linux/amd64")
            with contextlib.suppress(EngineError):
                read_states(base.labels)
            change = Change(labels={"a": "b"}, environment={"B": "2"})
            to_documents(add_layers(base, [layer], change, created=CREATED))
        except EngineError:
            results["refused"] += 1
        else:
            results["used"] += 1
    assert results["used"] > 0
    assert results["refused"] > results["used"]


@pytest.mark.parametrize("name", ["index.json", "manifest", "config"])
def test_an_endlessly_nested_document_is_refused(layout: Layout, name: str) -> None:
    make_base(layout, "base")
    nested = b'{"a":' * 100_000
    descriptor = Descriptor(media_type=OCI_CONFIG, digest=digest_of(nested), size=len(nested))
    layout.put_blob(descriptor, lambda: io.BytesIO(nested))
    if name == "index.json":
        (layout.path / "index.json").write_bytes(nested)
    elif name == "manifest":
        set_entries(layout, [{**descriptor.to_json(), "mediaType": OCI_INDEX}])
    else:
        manifest = {**json.loads(layout.read_manifest("base").raw), "config": descriptor.to_json()}
        layout.put_manifest(Document(media_type=OCI_MANIFEST, raw=dump(manifest)), "base")
    with pytest.raises(EngineError):
        resolve(layout, "base", platform="linux/amd64")


def test_the_index_of_a_layout_has_a_maximum_size(layout: Layout) -> None:
    make_base(layout, "base")
    with (layout.path / "index.json").open("ab") as stream:
        stream.truncate(5 << 20)
    with pytest.raises(EngineError, match="more than 4194304 bytes"):
        layout.read_manifest("base")
