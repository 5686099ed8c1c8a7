"""The prediction whether a node would hit, from an image's labels and the node's facts."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click.testing
import pytest

from chatterbox_prewarm.commands.nodes import report_node_fit
from chatterbox_prewarm.errors import BadInputError, EngineError, FingerprintMismatchError
from chatterbox_prewarm.families.registry import applicable
from chatterbox_prewarm.image import oci
from chatterbox_prewarm.image.compose import platform_of, resolve
from chatterbox_prewarm.image.labels import PACKAGES, STATES, image_labels
from chatterbox_prewarm.image.node_fit import compare_with_node
from chatterbox_prewarm.image.oci import Descriptor, Document, Image
from chatterbox_prewarm.image.state_layers import StateLayers, change_for
from chatterbox_prewarm.system.fingerprint import ABSENT
from tests.helpers.states import make_state, make_state_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

    from chatterbox_prewarm.state.manifest import Manifest

CPU = {"arch": "x86_64", "cpu_model": "any", "cpu_features": "avx sse", "instruction_set": "avx sse"}
NO_GPU = {"gpu": ABSENT, "compute_capability": ABSENT, "driver": ABSENT}
H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "550.54.15"}
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "550.54.15"}


def complete(manifest: Manifest) -> Manifest:
    """Add the other families that a start would use, which depend only on software."""
    names = [name for name in applicable("aot", "cuda") if manifest.family(name) is None]
    more = [replace(manifest.families[0], name=name, requires={"torch": "2.6.0"}, files=()) for name in names]
    return replace(manifest, families=(*manifest.families, *more))


@pytest.fixture
def labels(tmp_path: Path) -> dict[str, str]:
    """Labels of an image with states for an H100 and an L4, which also require facts of software."""
    software = {"torch": "2.6.0", "site_packages": "/opt/venv", "weights": "1" * 64, "regions": "2" * 64, "cache": "/c"}
    return image_labels(
        [
            complete(make_state_for(tmp_path / "states" / facts["gpu"][-2:], {**facts, **software}))
            for facts in (H100, L4)
        ]
    )


def image_of(labels: Mapping[str, str], *env: str, architecture: str = "amd64") -> Image:
    return Image(
        config={
            "os": "linux",
            "architecture": architecture,
            "config": {"Labels": dict(labels), "Env": list(env)},
            "rootfs": {"type": "layers", "diff_ids": []},
        },
        layers=(),
    )


def test_a_node_like_that_of_the_bake_hits_with_every_family(labels: dict[str, str]) -> None:
    node_fit = compare_with_node(image_of(labels), {**CPU, **L4})
    node_fit.require_hit()
    assert node_fit.hits
    selected, *families, other = node_fit.lines()
    assert selected.startswith("state cuda-nvidia-l4-cc8.9-driver550.54.15-torch2.6.0-aot-")
    assert selected.endswith(": would hit")
    assert sorted(families) == sorted(f"  {name}: fits" for name in applicable("aot", "cuda"))
    assert "not used: aot (" in other
    assert "GPU: baked with NVIDIA H100, here NVIDIA L4" in other


def test_a_different_driver_is_named_for_the_nearest_state(labels: dict[str, str]) -> None:
    node_fit = compare_with_node(image_of(labels), {**CPU, **L4, "driver": "570.1"})
    with pytest.raises(FingerprintMismatchError) as caught:
        node_fit.require_hit()
    assert caught.value.exit_code == 11
    words = "GPU driver: baked with 550.54.15, here 570.1"
    assert "the nearest state, cuda-nvidia-l4-" in caught.value.message
    assert f"aot ({words})" in caught.value.message
    assert f"  aot: {words}" in node_fit.lines()
    assert "  numba: fits" in node_fit.lines()


def test_a_node_with_another_gpu_or_without_one_would_miss(labels: dict[str, str]) -> None:
    a100 = {**CPU, "gpu": "NVIDIA A100", "compute_capability": "8.0", "driver": "550.54.15"}
    for host in (a100, {**CPU, **NO_GPU}):
        with pytest.raises(FingerprintMismatchError, match=f"GPU: baked with NVIDIA .*, here {host['gpu']}"):
            compare_with_node(image_of(labels), host).require_hit()


def test_the_nearest_state_is_the_one_with_the_fewest_differences(labels: dict[str, str]) -> None:
    near = {**CPU, **L4, "driver": "1"}
    assert compare_with_node(image_of(labels), near).states[0].name.startswith("cuda-nvidia-l4-")
    assert (
        compare_with_node(image_of(labels), {**near, **H100, "driver": "1"})
        .states[0]
        .name.startswith("cuda-nvidia-h100-")
    )


def test_the_device_is_that_of_the_host_then_of_the_image_then_of_the_state(labels: dict[str, str]) -> None:
    host = {**CPU, **L4}
    assert compare_with_node(image_of(labels), host).hits
    assert compare_with_node(image_of(labels, "CHATTERBOX_PREWARM_DEVICE=cuda:0"), host).hits
    on_cpu = compare_with_node(image_of(labels, "CHATTERBOX_PREWARM_DEVICE=cpu"), host)
    assert not on_cpu.hits
    assert "  device: baked for cuda, here cpu" in on_cpu.lines()
    assert compare_with_node(image_of(labels, "CHATTERBOX_PREWARM_DEVICE=cpu"), {**host, "device": "cuda"}).hits


VENV = "PATH=/opt/venv/bin:/usr/local/bin:/usr/bin"


def host_baked(tmp_path: Path, packages: str, python: str = "cpython-311 3.11.2") -> Manifest:
    """Make a complete state whose compiled family requires this path of the Python packages and this Python."""
    facts = {**H100, "torch": "2.6.0", "site_packages": packages, "python": python}
    return complete(make_state_for(tmp_path / "states" / "one", facts))


@pytest.mark.parametrize(
    ("packages", "python", "env", "words"),
    [
        ("/opt/venv/lib/python3.11/site-packages", "cpython-311 3.11.2", [VENV], ""),
        ("/usr/local/lib/python3.11/dist-packages", "cpython-311 3.11.2", [VENV], ""),
        ("/opt/venv/lib/python3.11/site-packages", "cpython-311 3.11.2", [VENV, "PYTHON_VERSION=3.11.2"], ""),
        ("/opt/venv/lib/python3.11/site-packages", "cpython-311 3.11.2", [], ""),
        (
            "/home/me/.venv/lib/python3.11/site-packages",
            "cpython-311 3.11.2",
            [VENV],
            "baked with /home/me/.venv/lib/python3.11/site-packages, but /home/me/.venv/bin is not in the image's PATH",
        ),
        (
            "/opt/venv/lib/python3.11/site-packages",
            "cpython-311 3.11.2",
            [VENV, "PYTHON_VERSION=3.12.1"],
            "Python: baked with cpython-311 3.11.2, the image has 3.12.1",
        ),
    ],
)
def test_a_state_that_was_baked_with_another_python_would_miss_and_is_not_appended(
    packages: str, python: str, env: list[str], words: str, tmp_path: Path
) -> None:
    manifest = host_baked(tmp_path, packages, python)
    image = image_of(image_labels([manifest]), *env)
    node_fit = compare_with_node(image, {**CPU, **H100})
    assert node_fit.hits == (not words)
    assert words in "\n".join(node_fit.lines())
    base = image_of({"io.chatterbox-prewarm.torch": "torch-2.6"}, *env)
    added = StateLayers(layers=(), manifests=(manifest,))
    if not words:
        assert change_for(base, added).labels
        return
    with pytest.raises(BadInputError, match="cannot use the family aot of the state") as caught:
        change_for(base, added)
    assert words in caught.value.message


def test_a_fact_that_this_version_cannot_compare_counts_as_a_miss(labels: dict[str, str]) -> None:
    raw = json.loads(labels[STATES])
    for state in raw["states"]:
        state["families"]["aot"]["requires"]["gpu_memory"] = "24 GB"
    with pytest.raises(FingerprintMismatchError, match="gpu_memory: baked with 24 GB, which this version cannot"):
        compare_with_node(image_of({STATES: json.dumps(raw)}), {**CPU, **L4}).require_hit()


def test_a_family_of_a_newer_version_is_compared(labels: dict[str, str]) -> None:
    raw = json.loads(labels[STATES])
    for state in raw["states"]:
        state["families"]["future"] = {"bytes": 1, "requires": {"driver": "1"}}
    with pytest.raises(FingerprintMismatchError, match=r"future \(GPU driver: baked with 1, here 550"):
        compare_with_node(image_of({STATES: json.dumps(raw)}), {**CPU, **L4}).require_hit()


def test_a_state_without_a_family_that_the_image_uses_would_miss(tmp_path: Path) -> None:
    """A start counts a miss for each family that the state does not have."""
    manifest = make_state_for(tmp_path / "state", {"arch": "x86_64"}, device="cpu", profile="eager")
    host = {**CPU, **NO_GPU}
    node_fit = compare_with_node(image_of(image_labels([manifest]), "CHATTERBOX_PREWARM_PROFILE=aot"), host)
    assert "  aot: not in the state" in node_fit.lines()
    with pytest.raises(FingerprintMismatchError, match=r"aot \(not in the state\)"):
        node_fit.require_hit()


@pytest.mark.parametrize(("packages", "hits"), [("lean", True), ("full", False), ("", False)])
def test_a_lean_image_needs_no_families_of_upstream(packages: str, hits: bool, tmp_path: Path) -> None:
    """The label of the image counts, and not the packages of the machine that runs the command."""
    state = {"bytecode": {"pack": b"x"}, "conditionals": {"voice": b"x"}}
    labels = image_labels([make_state(tmp_path / "state", state, {name: {"arch": "x86_64"} for name in state})])
    image = image_of(labels | ({PACKAGES: packages} if packages else {}))
    assert compare_with_node(image, {**CPU, **NO_GPU}).hits == hits


def test_the_command_prints_the_prediction_and_exits_with_11_for_a_miss(labels: dict[str, str]) -> None:
    @click.command()
    @click.argument("driver")
    def check(driver: str) -> None:
        report_node_fit(compare_with_node(image_of(labels), {**CPU, **L4, "driver": driver}))

    runner = click.testing.CliRunner()
    hit = runner.invoke(check, ["550.54.15"])
    assert hit.exit_code == 0
    assert "would hit" in hit.output
    missed = runner.invoke(check, ["570.1"])
    assert isinstance(missed.exception, FingerprintMismatchError)
    assert "would miss" in missed.output


class Memory:
    """A store in memory that records which blobs are read."""

    name = "memory"

    def __init__(self) -> None:
        self.manifests: dict[str, Document] = {}
        self.blobs: dict[str, bytes] = {}
        self.opened: list[str] = []

    def add(self, image: Image, reference: str = "") -> Descriptor:
        document, config, content = oci.to_documents(image)
        self.blobs[config.digest] = content
        self.put_manifest(document, reference or document.digest)
        return Descriptor(media_type=document.media_type, digest=document.digest, size=len(document.raw))

    def read_manifest(self, reference: str) -> Document:
        return self.manifests[reference]

    def has_manifest(self, reference: str) -> bool:
        return reference in self.manifests

    @contextlib.contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[BinaryIO]:
        self.opened.append(descriptor.digest)
        yield io.BytesIO(self.blobs[descriptor.digest])

    def has_blob(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.blobs

    def put_blob(self, descriptor: Descriptor, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> None:
        with opened() as stream:
            self.blobs[descriptor.digest] = stream.read()

    def put_manifest(self, document: Document, reference: str, *, check: Callable[[], None] | None = None) -> None:
        assert check is None
        self.manifests[reference] = document


def index(store: Memory, *entries: tuple[Descriptor, dict[str, str] | None]) -> None:
    raw: list[dict[str, Any]] = [
        {**entry.to_json(), **({"platform": platform} if platform else {})} for entry, platform in entries
    ]
    document = Document(media_type=oci.OCI_INDEX, raw=oci.dump({"schemaVersion": 2, "manifests": raw}))
    store.put_manifest(document, "latest")


def test_only_the_configuration_of_an_image_is_read(labels: dict[str, str]) -> None:
    store = Memory()
    store.add(image_of(labels), "latest")
    assert compare_with_node(resolve(store, "latest", platform=platform_of("x86_64")), {**CPU, **L4}).hits
    assert len(store.opened) == 1


@pytest.mark.parametrize(("arch", "platform"), [("x86_64", "amd64"), ("aarch64", "arm64")])
def test_the_image_for_the_architecture_of_the_host_is_chosen_from_an_index(
    labels: dict[str, str], arch: str, platform: str
) -> None:
    store = Memory()
    amd, arm = (store.add(image_of(labels, architecture=name)) for name in ("amd64", "arm64"))
    index(
        store,
        (amd, {"os": "unknown", "architecture": "unknown"}),
        (amd, {"os": "linux", "architecture": "amd64"}),
        (arm, {"os": "linux", "architecture": "arm64", "variant": "v8"}),
    )
    assert resolve(store, "latest", platform=platform_of(arch)).platform == f"linux/{platform}"


def test_an_index_without_the_platform_of_the_host_is_refused_with_the_platforms_it_has(labels: dict[str, str]) -> None:
    store = Memory()
    entry = store.add(image_of(labels))
    index(store, (entry, {"os": "linux", "architecture": "amd64"}))
    with pytest.raises(EngineError, match="no image for linux/arm64, only for: linux/amd64"):
        resolve(store, "latest", platform="linux/arm64")
    index(store, (entry, None))
    assert resolve(store, "latest", platform="linux/amd64").labels == labels


def test_a_manifest_that_is_not_an_image_or_has_a_huge_configuration_is_refused(labels: dict[str, str]) -> None:
    store = Memory()
    store.put_manifest(Document(media_type="application/octet-stream", raw=b"{}"), "latest")
    with pytest.raises(EngineError, match="is not an image; its media type is"):
        resolve(store, "latest", platform="linux/amd64")
    store.add(image_of({**labels, "large": "x" * (oci.MAX_DOCUMENT + 1)}), "latest")
    with pytest.raises(EngineError, match="the limit is 4194304"):
        resolve(store, "latest", platform="linux/amd64")
    assert store.opened == []


def test_each_model_of_an_image_needs_a_state_that_fits(tmp_path: Path) -> None:
    def state(variant: str, facts: Mapping[str, str]) -> Manifest:
        manifest = make_state_for(tmp_path / f"{variant}-{facts['gpu'][-2:]}", dict(facts))
        return complete(replace(manifest, variant=variant))

    english = [state("english", facts) for facts in (H100, L4)]
    both = image_of(image_labels([*english, state("multilingual", H100)]))
    on_h100 = compare_with_node(both, {**CPU, **H100})
    on_h100.require_hit()
    lines = on_h100.lines()
    assert [line for line in lines if line.startswith("model ")] == ["model english:", "model multilingual:"]
    assert sum(line.endswith(": would hit") for line in lines) == 2
    assert sum("not used" in line for line in lines) == 1, "English for the L4"
    on_l4 = compare_with_node(both, {**CPU, **L4})
    assert not on_l4.hits
    assert [on_l4.variants[state.name] for state in on_l4.misses] == ["multilingual"]
    with pytest.raises(FingerprintMismatchError, match="GPU: baked with NVIDIA H100, here NVIDIA L4"):
        on_l4.require_hit()
