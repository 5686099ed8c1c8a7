"""The bill of materials is valid, complete and deterministic."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from chatterbox_prewarm.errors import BadInputError, IntegrityError, WeightsError
from chatterbox_prewarm.image.sbom import make_sbom
from chatterbox_prewarm.system.digests import FileEntry
from chatterbox_prewarm.weights.record import RECORD_NAME
from tests.helpers.states import PROVENANCE, make_state

REVISION = "d" * 40
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Multi-Arch: same
Version: 2.36-9+deb12u10
Conffiles:
 /etc/ld.so.conf.d/x86_64-linux-gnu.conf d4e7a7b88a71b5ffd9e2644e71a0cfab
Description: GNU C Library: Shared libraries
 Version: no field, since it continues the description

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1.0

Package: adduser
Status: install ok installed
Architecture: all
Version: 1:3.134
"""


def write_record(directory: Path, repository: str = "someone/voice", revision: str = REVISION) -> None:
    files = [vars(FileEntry(path="ve.safetensors", size=3, sha256="6" * 64))]
    raw = {"schema": 1, "variant": "english", "repository": repository, "revision": revision, "synthetic": None}
    directory.mkdir(exist_ok=True)
    (directory / RECORD_NAME).write_text(json.dumps({**raw, "files": files}))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The files of an image that are listed, next to a warm state and weights."""
    root = tmp_path / "image"
    packages = root / "opt/venv/lib/python3.11/site-packages"
    for folder, headers in {
        "Some_Package-1.2.dist-info": "Name: Some_Package\nVersion: 1.2\nLicense-Expression: MIT OR Apache-2.0\n",
        "named-2.dist-info": "Name: named\nVersion: 2\nLicense: Apache 2.0, with changes\n",
        "classified-3.dist-info": "Name: classified\nVersion: 3\nLicense: UNKNOWN\n"
        "Classifier: License :: OSI Approved :: BSD License\nClassifier: License :: OSI Approved\n",
        "wordy-4.dist-info": "Name: wordy\nVersion: 4\nLicense: Permission is hereby granted\n  and so on\n",
        "broken-5.dist-info": "Version: 5\n",
    }.items():
        (packages / folder).mkdir(parents=True)
        (packages / folder / "METADATA").write_text(f"Metadata-Version: 2.1\n{headers}")
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text('ID=debian\nVERSION_ID="12"\n')
    make_state(tmp_path / "warm", {"numba": {"librosa/filters.nbc": b"machine code"}, "signal": {"constants": b"c"}})
    write_record(tmp_path / "weights")
    return root


def make(tmp_path: Path, root: Path) -> dict[str, Any]:
    text = make_sbom(tmp_path / "warm", tmp_path / "weights", root=root)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document: dict[str, Any] = json.loads(text)
    return document


def components(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return all components, also nested ones, by their references."""
    by_reference, queue = {}, list(document["components"])
    while queue:
        component = queue.pop()
        by_reference[component["bom-ref"]] = component
        queue += component.get("components", [])
    return by_reference


def licenses(component: dict[str, Any]) -> list[str]:
    return [
        entry.get("expression") or entry["license"].get("id") or entry["license"]["name"]
        for entry in component.get("licenses", [])
    ]


def test_every_package_of_an_image_is_listed_with_version_licence_and_purl(tmp_path: Path, image: Path) -> None:
    found = components(make(tmp_path, image))
    python = {name: found[f"pkg:pypi/{name}"] for name in ("some-package@1.2", "named@2", "classified@3", "wordy@4")}
    assert [licenses(component) for component in python.values()] == [
        ["MIT OR Apache-2.0"],
        ["Apache 2.0, with changes"],
        ["BSD License"],
        [],
    ]
    assert python["some-package@1.2"]["version"] == "1.2"
    system = sorted(reference for reference in found if reference.startswith("pkg:deb/"))
    assert system == [
        "pkg:deb/debian/adduser@1:3.134?arch=all&distro=debian-12",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12",
    ]
    assert found[system[0]]["purl"] == system[0]
    assert len([reference for reference in found if reference.startswith("pkg:pypi/")]) == len(python)


def test_every_file_of_weights_and_state_is_listed_with_its_digest(tmp_path: Path, image: Path) -> None:
    found = components(make(tmp_path, image))
    assert found["weights"]["purl"] == f"pkg:huggingface/someone/voice@{REVISION}"
    for reference, digest in {
        "weights/ve.safetensors": "6" * 64,
        "warm-state/numba/librosa/filters.nbc": hashlib.sha256(b"machine code").hexdigest(),
        "warm-state/signal/constants": hashlib.sha256(b"c").hexdigest(),
        "warm-state/manifest.json": hashlib.sha256((tmp_path / "warm/manifest.json").read_bytes()).hexdigest(),
    }.items():
        assert found[reference]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    properties = {entry["name"]: entry["value"] for entry in found["warm-state"]["properties"]}
    assert properties["io.chatterbox-prewarm:revision"] == PROVENANCE.revision
    assert properties["io.chatterbox-prewarm:base-image"] == PROVENANCE.base_image


def test_each_of_several_checkpoints_is_listed(tmp_path: Path, image: Path) -> None:
    record = json.loads((tmp_path / "weights" / RECORD_NAME).read_text())
    (tmp_path / "weights" / RECORD_NAME).unlink()
    for variant in ("english", "turbo"):
        (tmp_path / "weights" / variant).mkdir()
        (tmp_path / "weights" / variant / RECORD_NAME).write_text(json.dumps({**record, "variant": variant}))
    found = components(make(tmp_path, image))
    for variant in ("english", "turbo"):
        assert found[f"weights/{variant}/ve.safetensors"]["hashes"][0]["content"] == "6" * 64
        properties = {entry["name"]: entry["value"] for entry in found[f"weights/{variant}"]["properties"]}
        assert properties["io.chatterbox-prewarm:variant"] == variant


def test_weights_without_an_owner_have_no_purl(tmp_path: Path, image: Path) -> None:
    write_record(tmp_path / "weights", "own", "unversioned")
    weights = components(make(tmp_path, image))["weights"]
    assert (weights["name"], weights["version"], "purl" in weights) == ("own", "unversioned", False)


def test_the_document_is_deterministic_and_another_image_has_another_serial_number(tmp_path: Path, image: Path) -> None:
    first = make(tmp_path, image)
    moved = image.rename(tmp_path / "moved")
    assert make(tmp_path, moved) == first
    assert make_sbom(tmp_path / "warm", tmp_path / "weights", root=moved) == make_sbom(
        tmp_path / "warm", tmp_path / "weights", root=moved
    )
    write_record(tmp_path / "weights", revision="e" * 40)
    assert make(tmp_path, moved)["serialNumber"] != first["serialNumber"]


def test_the_timestamp_comes_from_source_date_epoch(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert "timestamp" not in make(tmp_path, image)["metadata"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert make(tmp_path, image)["metadata"]["timestamp"].startswith("2023-11-14T22:13:20")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(BadInputError, match="is 'yesterday', which is not a time"):
        make(tmp_path, image)


@pytest.mark.usefixtures("image")
def test_the_packages_of_this_machine_are_listed(tmp_path: Path) -> None:
    found = components(make(tmp_path, Path("/")))
    version = metadata.version("pytest")
    assert found[f"pkg:pypi/pytest@{version}"]["version"] == version


def test_a_system_without_a_list_of_packages_is_reported(
    tmp_path: Path, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (image / "var/lib/dpkg/status").unlink()
    (image / "etc/os-release").unlink()
    found = components(make(tmp_path, image))
    assert not [reference for reference in found if reference.startswith("pkg:deb/")]
    assert "no system package is listed" in caplog.text


def test_a_missing_environment_state_or_checkpoint_is_reported(tmp_path: Path, image: Path) -> None:
    with pytest.raises(BadInputError, match="there is no Python environment"):
        make(tmp_path, image / "opt")
    with pytest.raises(IntegrityError, match=r"has no manifest\.json"):
        make_sbom(tmp_path / "weights", tmp_path / "weights", root=image)
    with pytest.raises(WeightsError, match="no weights directory"):
        make_sbom(tmp_path / "warm", tmp_path / "nowhere", root=image)


def test_every_state_of_a_folder_is_listed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "states").mkdir(exist_ok=True)
        make_state(tmp_path / "states" / name, {"signal": {"constants": name.encode()}})
    write_record(tmp_path / "weights")
    document = json.loads(make_sbom(tmp_path / "states", tmp_path / "weights"))
    listed = {entry["name"]: entry for entry in document["components"] if entry["name"].startswith("warm-state")}
    assert set(listed) == {"warm-state/one", "warm-state/two"}
    assert len({entry["version"] for entry in listed.values()}) == 2
