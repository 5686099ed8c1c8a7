"""Test that the provenance holds the facts of the bake and of its builder, and that tags of base images are refused."""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.state import provenance
from chatterbox_prewarm.state.manifest import UNKNOWN
from chatterbox_prewarm.system.fingerprint import package_digest
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "5" * 64
BASE = "debian@sha256:" + "0123456789abcdef" * 4


def test_the_facts_of_the_builder_are_recorded_with_those_of_the_bake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.REVISION, "c" * 40)
    monkeypatch.setenv(provenance.BUILDER, "https://ci.example.com/jobs/7")
    monkeypatch.setenv(provenance.BASE_DIGEST, BASE)
    recorded = provenance.read_provenance({"levels": "1", "device": "cpu"})
    assert (recorded.revision, recorded.builder) == ("c" * 40, "https://ci.example.com/jobs/7")
    assert recorded.base_image == BASE
    assert list(recorded.parameters.items()) == [("device", "cpu"), ("levels", "1")]
    assert recorded.source == package_digest("chatterbox_prewarm") != "absent"


def test_missing_facts_of_the_builder_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (provenance.REVISION, provenance.BUILDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(provenance.BASE_DIGEST, "")  # an image build without the build argument sets an empty variable
    recorded = provenance.read_provenance({})
    assert (recorded.revision, recorded.builder, recorded.base_image) == (UNKNOWN, UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("name", ["debian:bookworm", "sha256:abc", "md5:" + "0" * 64, BASE + "0", BASE.upper()])
def test_a_base_image_without_a_digest_ends_a_bake_before_its_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.BASE_DIGEST, name)
    nowhere = ROOT / "nowhere"
    with pytest.raises(BadInputError, match="digest of an image") as caught:
        bake(BakeOptions(weights=nowhere / "weights", warm=nowhere / "warm", cache=nowhere / "cache"))
    assert "sha256:" in caught.value.next_step
    assert not nowhere.exists()
    with pytest.raises(BadInputError, match="digest of an image"):
        provenance.check_base_image(name)


def test_the_packages_digest_is_over_sorted_names_and_versions() -> None:
    digest = hashlib.sha256(b"a-b==1\nc==2\n").hexdigest()
    assert provenance.packages_digest({"c": "2", "a-b": "1"}) == digest
    assert provenance.packages_digest({"c": "2", "a-b": "1.0"}) != digest


def test_packages_are_listed_by_normalized_name_and_those_without_a_name_are_ignored(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name, version in ((first, "Some_Package", "1"), (second, "some.package", "2"), (second, "other", "3")):
        (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (first / "broken-1.dist-info").mkdir()
    packages = provenance.by_name(metadata.distributions(path=[str(first), str(second)]))
    assert {name: package.version for name, package in packages.items()} == {"other": "3", "some-package": "1"}
    assert provenance.by_name(metadata.distributions())["pytest"].version == metadata.version("pytest")


def test_the_parameters_of_a_bake_have_no_paths_and_name_a_voice_by_its_digest(tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    clip.write_bytes(b"a clip")
    options = BakeOptions(
        weights=tmp_path / "weights",
        warm=tmp_path / "warm",
        cache=tmp_path / "cache",
        execution=Execution(profile="aot", graphs=False),
        levels=(1, 2),
        voices={"anna": clip},
        families=("aot", "numba"),
    )
    parameters = options.parameters()
    assert parameters == {
        "device": "cpu",
        "families": "aot,numba",
        "levels": "1,2",
        "profile": "aot",
        "t3_dtype": "float32",
        "graphs": "False",
        "voice:anna": "sha256:" + hashlib.sha256(b"a clip").hexdigest(),
    }
    assert BakeOptions.from_dict(options.to_dict()) == options


def test_builder_args_come_from_arguments_then_variables_then_a_base_with_a_digest() -> None:
    assert provenance.builder_args({}, {}) == {}
    assert provenance.builder_args({"BASE": "debian:12", "STACK": "torch-2.6"}, {"PATH": "/bin"}) == {}
    assert provenance.builder_args({"BASE": f"debian@{DIGEST}"}, {}) == {"BASE_DIGEST": f"debian@{DIGEST}"}
    assert provenance.builder_args({"BASE": f"debian@{DIGEST}", "BASE_DIGEST": DIGEST}, {}) == {"BASE_DIGEST": DIGEST}
    environment = {provenance.REVISION: "old", provenance.BUILDER: "a job", "BUILDER": "unrelated"}
    assert provenance.builder_args({"SOURCE_REVISION": "new", "BUILDER": ""}, environment) == {
        "SOURCE_REVISION": "new",
        "BUILDER": "a job",
    }


def test_the_dockerfile_passes_every_builder_argument_to_the_bake() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for argument, variable in provenance.ARGUMENTS.items():
        assert f"ARG {argument}=\n" in text
        assert f'{variable}="${{{argument}}}"' in text
