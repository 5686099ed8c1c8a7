"""The manifest of a warm state: contents, origin, and the digest of every file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatterbox_prewarm.model.profiles import Execution  # noqa: TC001 - the parser evaluates the annotations
from chatterbox_prewarm.system.digests import FileEntry  # noqa: TC001 - as above

if TYPE_CHECKING:
    from chatterbox_prewarm.weights.record import WeightsRecord

SCHEMA_VERSION = 6
MANIFEST_NAME = "manifest.json"
#: The first schema that contains a digest of the manifest itself.
FIRST_SEALED_SCHEMA = 3
#: The value of a provenance field that the builder did not set, and of all fields before schema 4.
UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True)
class FamilyEntry:
    """One cache family of a state.

    Attributes:
        requires: the facts that decide whether the family can be reused, with their values at bake.
        seconds_spent: the time that the bake spent on the family.
        seconds_saved: the time of a cold start for this work, minus the time to load the family.
    """

    name: str
    requires: dict[str, str]
    files: tuple[FileEntry, ...]
    seconds_spent: float
    seconds_saved: float

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """The checkpoint that a state was baked with: its origin and the digest of its files."""

    repository: str
    revision: str
    set_digest: str
    files: tuple[FileEntry, ...]

    @classmethod
    def from_record(cls, record: WeightsRecord) -> WeightsEntry:
        """Make the entry of a recorded checkpoint."""
        return cls(
            repository=record.repository, revision=record.revision, set_digest=record.set_digest, files=record.files
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A synthesis that the bake made and that a proof repeats. The same inputs must give the same samples.

    A bake without the GPU cannot speak. Then `samples` is 0 and both digests are empty.

    Attributes:
        tokens_sha256: over the speech tokens as little-endian int64. Shows whether T3 causes a difference.
        pcm_sha256: over the watermarked audio as little-endian 16-bit PCM.
    """

    text: str
    voice: str
    seed: int
    max_new_tokens: int
    threads: int
    device: str
    sample_rate: int
    samples: int
    tokens_sha256: str
    pcm_sha256: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a state was made. The fields answer the questions of SLSA.

    Other parts of the manifest name the builder's machine (`fingerprint`), the time (`created`) and the weights.

    Attributes:
        source: SHA-256 over the sources of this package at bake; see `fingerprint.package_digest`.
        packages: SHA-256 over the lines `name==version` of all installed Python packages.
        revision: the revision of the sources in version control, as given by the builder.
        base_image: the digest of the image that the bake ran in, as given by the builder.
        builder: what ran the bake, such as the URL of a CI job, as given by the builder.
        parameters: the parameters of the bake by name. A voice is recorded as the digest of its clip.
    """

    source: str = UNKNOWN
    packages: str = UNKNOWN
    revision: str = UNKNOWN
    base_image: str = UNKNOWN
    builder: str = UNKNOWN
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Measurements of the bake's own starts. All are 0 before schema 5.

    Attributes:
        cold_seconds: from exec to attached without a state, plus the seconds that such a start compiles later.
        ready_seconds: from exec to ready with the state.
        resident_bytes: peak resident memory of the process that started cold and ran the warm-up.
        device_bytes: peak GPU memory of torch's allocator in that process; 0 on a CPU.
    """

    cold_seconds: float = 0.0
    ready_seconds: float = 0.0
    resident_bytes: int = 0
    device_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a start needs to know before it opens a file of the state.

    Attributes:
        schema: the schema of the file that was read. A manifest is always written with the present schema.
        cross_compiled: the bake compiled for a GPU on a machine without one, so nothing has run yet. Before schema 6
            always False.
    """

    schema: int = SCHEMA_VERSION
    tool: str
    created: str
    variant: str
    execution: Execution
    levels: tuple[int, ...]
    warmup_texts: tuple[str, ...]
    weights: WeightsEntry
    fingerprint: dict[str, str]
    families: tuple[FamilyEntry, ...]
    voices: tuple[str, ...]
    reference: Reference
    provenance: Provenance
    measured: Measurements = field(default_factory=Measurements)
    cross_compiled: bool = False
    set_digest: str = field(default="")

    def family(self, name: str) -> FamilyEntry | None:
        """Return the family with this name, or None if it was not baked."""
        return next((family for family in self.families if family.name == name), None)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files of all families."""
        return tuple(file for family in self.families for file in family.files)
