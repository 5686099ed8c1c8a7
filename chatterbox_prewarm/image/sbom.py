"""Bill of materials: what an image is made of, as CycloneDX 1.6 in JSON.

Python packages, system packages, the weights and the warm state, each file of the latter two with its recorded digest.
The same image gives the same bytes: the serial number is of the content, and there is no time unless
`SOURCE_DATE_EPOCH` gives one.
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

from chatterbox_prewarm.errors import BadInputError, from_os_error
from chatterbox_prewarm.state.folder import states_in
from chatterbox_prewarm.state.manifest import MANIFEST_NAME, manifest_digest, read_manifest
from chatterbox_prewarm.state.provenance import by_name
from chatterbox_prewarm.system.digests import FileEntry
from chatterbox_prewarm.version import __version__
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License


logger = logging.getLogger(__name__)

#: Where an image keeps its Python packages, below its root.
_ENVIRONMENTS = "opt/venv/lib/python3.*/site-packages"
_DPKG_STATUS = "var/lib/dpkg/status"
#: Longer than any name of a licence: some packages have its whole text in that field.
_LICENSE_LENGTH = 100
_PREFIX = "io.chatterbox-prewarm"


def make_sbom(warm: Path, weights: Path, *, root: Path = Path("/")) -> str:
    """The bill of materials of an image, or of this machine.

    Args:
        warm: the warm state's directory, or a folder of several, which are all listed.
        weights: the checkpoint's directory.
        root: of the file system whose packages are listed. For `/` the Python packages are those of this interpreter,
            for any other root those of an image's environment, `/opt/venv`.

    Returns:
        a CycloneDX document.

    Raises:
        IntegrityError: there is no warm state, or its manifest was changed.
        WeightsError: there is no checkpoint with a record.
        BadInputError: there is no environment below `root`, or its list of packages cannot be read.
    """
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    subject = Component(
        name="chatterbox-prewarm", version=__version__, type=ComponentType.APPLICATION, bom_ref="chatterbox-prewarm"
    )
    time = _time()
    parts = [*_python_packages(root), *_system_packages(root), _weights(weights), *_warm_states(warm)]
    bom = Bom(
        components=parts,
        metadata=BomMetaData(component=subject, timestamp=time),  # without one, the library takes the present
        serial_number=uuid.UUID(int=0),  # stands for the one that the content gives
    )
    bom.register_dependency(subject, parts)
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    if time is None:
        del document["metadata"]["timestamp"]
    content = json.dumps(document, sort_keys=True)
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, content).urn
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _time() -> dt.datetime | None:
    """The time that `SOURCE_DATE_EPOCH` gives, if it does.

    Raises:
        BadInputError: it is no number of seconds.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return None
    try:
        return dt.datetime.fromtimestamp(int(epoch), tz=dt.timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise BadInputError(
            f"SOURCE_DATE_EPOCH is {epoch!r}, which is no time", next_step="give seconds since 1970, or unset it"
        ) from error


def _python_packages(root: Path) -> Iterator[Component]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    for name, distribution in by_name(_distributions(root)).items():
        purl = PackageURL(type="pypi", name=name, version=distribution.version)
        yield Component(
            name=name,
            version=distribution.version,
            type=ComponentType.LIBRARY,
            licenses=_licenses(distribution),
            purl=purl,
            bom_ref=str(purl),
        )


def _distributions(root: Path) -> Iterable[metadata.Distribution]:
    if root.resolve() == Path("/"):
        return metadata.distributions()
    paths = sorted(str(path) for path in root.glob(_ENVIRONMENTS))
    if not paths:
        raise BadInputError(
            f"there is no Python environment {root / _ENVIRONMENTS}", next_step="name the root of an image's files"
        )
    return metadata.distributions(path=paths)


def _licenses(distribution: metadata.Distribution) -> list[License]:
    """What a package says of its licence: an SPDX expression, a short name, or its classifiers; often nothing."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.license import DisjunctiveLicense

    make = LicenseFactory().make_from_string
    about = distribution.metadata
    for value in (*(about.get_all("License-Expression") or ()), *(about.get_all("License") or ())):
        if value.strip() not in ("", "UNKNOWN") and len(value) <= _LICENSE_LENGTH and "\n" not in value:
            return [make(value.strip())]
    classified = [value for value in about.get_all("Classifier") or () if value.startswith("License :: ")]
    names = sorted({value.rpartition(" :: ")[2] for value in classified} - {"OSI Approved"})
    return [DisjunctiveLicense(name=name) for name in names]


def _system_packages(root: Path) -> Iterator[Component]:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

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
    for fields in sorted(_paragraphs(text), key=lambda fields: (fields["Package"], fields["Architecture"])):
        purl = PackageURL(
            type="deb",
            namespace=namespace,
            name=fields["Package"],
            version=fields["Version"],
            qualifiers={"arch": fields["Architecture"], "distro": f"{namespace}-{system.get('VERSION_ID', 'unknown')}"},
        )
        yield Component(
            name=fields["Package"],
            version=fields["Version"],
            type=ComponentType.LIBRARY,
            purl=purl,
            bom_ref=str(purl),
        )


def _paragraphs(status: str) -> Iterator[Mapping[str, str]]:
    """The fields of each package that is installed; lines that continue one are none of those used here."""
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


def _weights(directory: Path) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    record = read_record(directory)
    namespace, _, name = record.repository.rpartition("/")
    # Only what has an owner on the model hub has an address there: not one's own, and not random weights.
    hub = PackageURL(type="huggingface", namespace=namespace, name=name, version=record.revision) if namespace else None
    return Component(
        name=record.repository,
        version=record.revision,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        purl=hub,
        bom_ref="weights",
        components=_files(record.files, "weights"),
        properties=_properties({"set-digest": record.set_digest, "variant": record.variant}),
    )


def _warm_states(warm: Path) -> Iterator[Component]:
    """A state as "warm-state", or those of a folder as "warm-state/KEY"."""
    found = states_in(warm)
    if len(found) < 2:
        found = {"": next(iter(found.values()), warm)}
    for name, path in found.items():
        yield _warm_state(path, f"warm-state/{name}" if name else "warm-state")


def _warm_state(warm: Path, reference: str) -> Component:
    """The state with a component for each family, in which its files are; the manifest is a file of its own."""
    from cyclonedx.model.component import Component, ComponentType

    manifest = read_manifest(warm)
    own = FileEntry(path=MANIFEST_NAME, size=0, sha256=manifest_digest(warm))
    families = [
        Component(
            name=family.name,
            type=ComponentType.DATA,
            bom_ref=f"{reference}#{family.name}",
            components=_files(family.files, reference),
        )
        for family in manifest.families
    ]
    made = manifest.provenance
    return Component(
        name=reference,
        version=manifest.set_digest,
        type=ComponentType.DATA,
        bom_ref=reference,
        components=[*_files([own], reference), *families],
        properties=_properties(
            {
                "set-digest": manifest.set_digest,
                "tool": manifest.tool,
                "source": made.source,
                "revision": made.revision,
                "base-image": made.base_image,
                "packages": made.packages,
            }
        ),
    )


def _files(entries: Iterable[FileEntry], owner: str) -> list[Component]:
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(
            name=entry.path,
            type=ComponentType.FILE,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=entry.sha256)],
            bom_ref=f"{owner}/{entry.path}",
        )
        for entry in entries
    ]


def _properties(values: Mapping[str, str]) -> list[Any]:
    from cyclonedx.model import Property

    return [Property(name=f"{_PREFIX}:{name}", value=value) for name, value in values.items()]
