"""Provenance: what a bake sees itself, what its builder tells it, and what is refused."""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bake.request import BakeRequest
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state import provenance
from chatterbox_prewarm.state.manifest import UNKNOWN
from chatterbox_prewarm.system.fingerprint import package_digest
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

TOLD = {provenance.REVISION: "c" * 40, provenance.BUILDER: "https://ci.example.com/jobs/7"}
BASE = "debian@sha256:" + "0123456789abcdef" * 4


def test_what_the_builder_tells_is_recorded_beside_what_the_bake_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TOLD, provenance.BASE_DIGEST: BASE}.items():
        monkeypatch.setenv(name, value)
    found = provenance.read_provenance({"levels": "1", "device": "cpu"})
    assert (found.revision, found.builder, found.base_image) == ("c" * 40, "https://ci.example.com/jobs/7", BASE)
    assert list(found.parameters.items()) == [("device", "cpu"), ("levels", "1")]
    assert found.source == package_digest("chatterbox_prewarm") != "absent"


def test_what_nobody_told_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (provenance.REVISION, provenance.BUILDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(provenance.BASE_DIGEST, "")  # as an image build sets it whose argument is empty
    found = provenance.read_provenance({})
    assert (found.revision, found.builder, found.base_image) == (UNKNOWN, UNKNOWN, UNKNOWN)


@pytest.mark.parametrize("name", ["debian:bookworm", "sha256:abc", "md5:" + "0" * 64, BASE + "0", BASE.upper()])
def test_a_base_image_named_by_a_tag_ends_a_bake_before_its_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.BASE_DIGEST, name)
    nowhere = ROOT / "nowhere"
    with pytest.raises(BadInputError, match="is no digest of an image") as caught:
        bake(nowhere / "weights", nowhere / "warm", cache=nowhere / "cache")
    assert "sha256:" in caught.value.next_step
    assert not nowhere.exists()
    with pytest.raises(BadInputError, match="is no digest of an image"):
        provenance.check_base_image(name)


def test_the_digest_of_the_packages_is_over_their_sorted_names_and_versions() -> None:
    lines = hashlib.sha256(b"a-b==1\nc==2\n").hexdigest()
    assert provenance.packages_digest({"c": "2", "a-b": "1"}) == lines
    assert provenance.packages_digest({"c": "2", "a-b": "1.0"}) != lines


def test_packages_go_by_their_normalized_names_and_what_has_none_is_passed_over(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name, version in ((first, "Some_Package", "1"), (second, "some.package", "2"), (second, "other", "3")):
        (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (first / "broken-1.dist-info").mkdir()
    found = provenance.by_name(metadata.distributions(path=[str(first), str(second)]))
    assert {name: distribution.version for name, distribution in found.items()} == {"other": "3", "some-package": "1"}
    assert provenance.by_name(metadata.distributions())["pytest"].version == metadata.version("pytest")


def test_the_parameters_of_a_bake_name_no_place_and_a_voice_by_the_digest_of_its_clip() -> None:
    clip = ROOT / "pyproject.toml"  # any file does
    request = BakeRequest(
        weights="/somewhere/weights",
        cache="/somewhere/cache",
        output="/somewhere/warm",
        made="/somewhere/made",
        device="cpu",
        execution={"profile": "aot", "graphs": False},
        levels=(1, 2),
        voices={"anna": str(clip)},
        families=("aot", "numba"),
    )
    assert request.parameters() == {
        "device": "cpu",
        "families": "aot,numba",
        "levels": "1,2",
        "profile": "aot",
        "graphs": "False",
        "voice:anna": "sha256:" + hashlib.sha256(clip.read_bytes()).hexdigest(),
    }


def test_what_a_build_is_told_reaches_the_bake_by_argument_variable_or_pinned_base() -> None:
    digest = "sha256:" + "5" * 64
    assert provenance.told({}, {}) == {}
    assert provenance.told({"BASE": "debian:12", "STACK": "torch-2.6"}, {"PATH": "/bin"}) == {}
    assert provenance.told({"BASE": f"debian@{digest}"}, {}) == {"BASE_DIGEST": f"debian@{digest}"}
    assert provenance.told({"BASE": f"debian@{digest}", "BASE_DIGEST": digest}, {}) == {"BASE_DIGEST": digest}
    environment = {"CHATTERBOX_PREWARM_REVISION": "old", "CHATTERBOX_PREWARM_BUILDER": "a job", "BUILDER": "unrelated"}
    assert provenance.told({"SOURCE_REVISION": "new", "BUILDER": ""}, environment) == {
        "SOURCE_REVISION": "new",
        "BUILDER": "a job",
    }


def test_the_dockerfile_hands_the_same_to_its_step() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for argument, variable in provenance.ARGUMENTS.items():
        assert f"ARG {argument}=\n" in text
        assert f'{variable}="${{{argument}}}"' in text
