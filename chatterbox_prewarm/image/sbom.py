"""Bill of materials: the contents of an image as CycloneDX 1.6 in JSON.

It lists Python packages, system packages, the weights and the warm states, the latter two with the digest of each file.
The same image gives the same bytes: the serial number is derived from the content, and there is no timestamp unless
`SOURCE_DATE_EPOCH` is set.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.state.manifest import MANIFEST_NAME
from chatterbox_prewarm.state.provenance import by_name
from chatterbox_prewarm.state.selection import states_in
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.digests import FileEntry
from chatterbox_prewarm.version import __version__
from chatterbox_prewarm.weights.checkpoints import checkpoints_in
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cyclonedx.model.license import License

    from chatterbox_prewarm.weights.record import WeightsRecord

logger = logging.getLogger(__name__)

#: Where an image has its Python packages, relative to its root.
_SITE_PACKAGES = "opt/venv/lib/python3.*/site-packages"
_DPKG_STATUS = "var/lib/dpkg/status"
#: Longer than the name of any license. Some packages have the whole text of their license in the field for its name.
_MAX_LICENSE = 100
_PREFIX = "io.chatterbox-prewarm"


def make_sbom(warm: Path, weights: Path, *, root: Path = Path("/")) -> str:
    """Return the bill of materials of an image, or of this machine.

    Args:
        warm: a warm state, or a folder of states, which are all listed.
        weights: the folder of the checkpoint.
        root: root of the file system whose packages are listed. For `/`, this lists the Python packages of
            this interpreter, and otherwise the packages of an image's environment, `/opt/venv`.

    Returns:
        a CycloneDX document.

    Raises:
        IntegrityError: there is no warm state, or its manifest is invalid.
        WeightsError: there is no checkpoint with a record.
        BadInputError: there is no environment below `root`, or its list of packages cannot be read.
    """
    subject = Component(
        name="chatterbox-prewarm", version=__version__, type=ComponentType.APPLICATION, bom_ref="chatterbox-prewarm"
    )
    timestamp = _timestamp()
    parts = [*_python_packages(root), *_system_packages(root), *_weights(weights), *_warm_states(warm)]
    bom = Bom(
        components=parts,
        metadata=BomMetaData(component=subject, timestamp=timestamp),  # None gives the current time
        serial_number=uuid.UUID(int=0),  # replaced below
    )
    bom.register_dependency(subject, parts)
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    if timestamp is None:
        del document["metadata"]["timestamp"]
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, content).urn
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _timestamp() -> dt.datetime | None:
    """Return the time that `SOURCE_DATE_EPOCH` gives, or None without it.

    Raises:
        BadInputError: it is not a number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return None
    try:
        return dt.datetime.fromtimestamp(int(epoch), tz=dt.timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise BadInputError(
            f"SOURCE_DATE_EPOCH is {epoch!r}, which is not a time",
            next_step="set it to seconds since 1970",
        ) from error


def _python_packages(root: Path) -> Iterator[Component]:
    for name, distribution in by_name(_distributions(root)).items():
        purl = PackageURL(type="pypi", name=name, version=distribution.version)
        yield _package(name, distribution.version, purl, _licenses(distribution))


def _package(name: str, version: str, purl: PackageURL, licenses: Iterable[License] = ()) -> Component:
    return Component(
        name=name, version=version, type=ComponentType.LIBRARY, licenses=licenses, purl=purl, bom_ref=str(purl)
    )


def _distributions(root: Path) -> Iterable[metadata.Distribution]:
    if root.resolve() == Path("/"):
        return metadata.distributions()
    paths = sorted(str(path) for path in root.glob(_SITE_PACKAGES))
    if not paths:
        raise BadInputError(
            f"there is no Python environment {root / _SITE_PACKAGES}", next_step="name the root of an image's files"
        )
    return metadata.distributions(path=paths)


def _licenses(distribution: metadata.Distribution) -> list[License]:
    """Return the license that a package declares: an SPDX expression, a short name, or its classifiers."""
    headers = distribution.metadata
    for value in (*(headers.get_all("License-Expression") or ()), *(headers.get_all("License") or ())):
        if value.strip() not in ("", "UNKNOWN") and len(value) <= _MAX_LICENSE and "\n" not in value:
            return [LicenseFactory().make_from_string(value.strip())]
    classifiers = [value for value in headers.get_all("Classifier") or () if value.startswith("License :: ")]
    names = sorted({value.rpartition(" :: ")[2] for value in classifiers} - {"OSI Approved"})
    return [DisjunctiveLicense(name=name) for name in names]


def _system_packages(root: Path) -> Iterator[Component]:
    status = root / _DPKG_STATUS
    if not status.exists():
        logger.warning("there is no %s, so no system package is listed", status)
        return
    system = _os_release(root)
    namespace = system.get("ID", "debian")
    try:
        text = status.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise from_os_error(error, "reading the list of system packages") from error
    for fields in sorted(_installed(text), key=lambda fields: (fields["Package"], fields["Architecture"])):
        purl = PackageURL(
            type="deb",
            namespace=namespace,
            name=fields["Package"],
            version=fields["Version"],
            qualifiers={"arch": fields["Architecture"], "distro": f"{namespace}-{system.get('VERSION_ID', 'unknown')}"},
        )
        yield _package(fields["Package"], fields["Version"], purl)


def _installed(status: str) -> Iterator[Mapping[str, str]]:
    """Yield the fields of each installed package. Continuation lines are skipped, because no used field has any."""
    for paragraph in status.split("\n\n"):
        lines = (line.partition(": ") for line in paragraph.splitlines() if line[:1] not in (" ", "\t"))
        fields = {name: value.strip() for name, _, value in lines}
        if fields.get("Status", "").endswith(" installed") and {"Package", "Version", "Architecture"} <= fields.keys():
            yield fields


def _os_release(root: Path) -> Mapping[str, str]:
    try:
        text = (root / "etc" / "os-release").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise from_os_error(error, "reading the name of the system") from error
    lines = (line.partition("=") for line in text.splitlines())
    return {name: value.strip().strip("\"'") for name, _, value in lines}


def _weights(directory: Path) -> Iterator[Component]:
    """Yield one checkpoint as "weights", or each of several as "weights/VARIANT"."""
    found = checkpoints_in(directory)
    for variant, path in found.items():
        yield _checkpoint(read_record(path), f"weights/{variant}" if len(found) > 1 else "weights")


def _checkpoint(record: WeightsRecord, reference: str) -> Component:
    owner, _, name = record.repository.rpartition("/")
    # Random or private weights have no owner and therefore no address on the model hub.
    purl = PackageURL(type="huggingface", namespace=owner, name=name, version=record.revision) if owner else None
    return Component(
        name=record.repository,
        version=record.revision,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        purl=purl,
        bom_ref=reference,
        components=_files(record.files, reference),
        properties=_properties({"set-digest": record.set_digest, "variant": record.variant}),
    )


def _warm_states(warm: Path) -> Iterator[Component]:
    """Yield one state as "warm-state", or each of several as "warm-state/KEY"."""
    paths = states_in(warm)
    if len(paths) < 2:
        yield _warm_state(next(iter(paths.values()), warm), "warm-state")
        return
    for key, path in paths.items():
        yield _warm_state(path, f"warm-state/{key}")


def _warm_state(path: Path, reference: str) -> Component:
    """Describe a state: its manifest as a file, and a component for each family with the files of the family."""
    state = State.read(path)
    manifest, provenance = state.manifest, state.manifest.provenance
    families = [
        Component(
            name=family.name,
            type=ComponentType.DATA,
            bom_ref=f"{reference}#{family.name}",
            components=_files(family.files, reference),
        )
        for family in manifest.families
    ]
    manifest_file = FileEntry(path=MANIFEST_NAME, size=0, sha256=state.manifest_digest)
    return Component(
        name=reference,
        version=manifest.set_digest,
        type=ComponentType.DATA,
        bom_ref=reference,
        components=[*_files([manifest_file], reference), *families],
        properties=_properties(
            {
                "set-digest": manifest.set_digest,
                "tool": manifest.tool,
                "source": provenance.source,
                "revision": provenance.revision,
                "base-image": provenance.base_image,
                "packages": provenance.packages,
            }
        ),
    )


def _files(entries: Iterable[FileEntry], owner: str) -> list[Component]:
    return [
        Component(
            name=entry.path,
            type=ComponentType.FILE,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)],
            bom_ref=f"{owner}/{entry.path}",
        )
        for entry in entries
    ]


def _properties(values: Mapping[str, str]) -> list[Property]:
    return [Property(name=f"{_PREFIX}:{name}", value=value) for name, value in values.items()]
