"""A warm state on disk: a directory with a manifest and one folder for each cache family."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import IntegrityError
from chatterbox_prewarm.families.registry import FAMILIES
from chatterbox_prewarm.state.compatibility import Compatibility, compare_families, compatibility_of
from chatterbox_prewarm.state.manifest import FIRST_SEALED_SCHEMA, MANIFEST_NAME, Manifest
from chatterbox_prewarm.state.manifest_file import BAKE_AGAIN, parse_manifest, read_manifest_bytes
from chatterbox_prewarm.state.ownership import refuse_changeable
from chatterbox_prewarm.state.signature import Trust, check_same_state, default_signature
from chatterbox_prewarm.system.digests import verify_files, walk_files
from chatterbox_prewarm.system.fingerprint import ABSENT, device_kind

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

#: Facts that are not part of a key. All states of an image share its checkpoint and its cache path, so a bake for new
#: weights has the key of the state that it replaces.
_NOT_IN_KEY = frozenset({"weights", "cache"})


@dataclass(frozen=True, kw_only=True)
class State:
    """A warm state whose manifest was read once.

    Attributes:
        path: the directory.
        manifest: the parsed manifest.
        manifest_bytes: the bytes of `manifest.json`.
        trusted_by: a sentence for each check of `Trust` that passed.
    """

    path: Path
    manifest: Manifest
    manifest_bytes: bytes
    trusted_by: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path, trust: Trust | None = None) -> State:
        """Read the manifest, check what the user trusts, parse it, and check the folder.

        The digests of the files are not compared here; see `check_files`.

        Args:
            path: the directory of the state.
            trust: a key or a digest that the manifest must match.

        Raises:
            IntegrityError: the state is missing, damaged or not trusted, or its folder holds anything unlisted.
            BadInputError: the key or the digest is invalid.
        """
        state = cls.read(path, trust)
        state.check_folder()
        return state

    @classmethod
    def read(cls, path: Path, trust: Trust | None = None) -> State:
        """Do the same as `open` without looking at anything but the manifest."""
        data = read_manifest_bytes(path)
        trusted_by = (trust or Trust()).check(path, data)
        manifest = parse_manifest(data, source=str(path / MANIFEST_NAME))
        return cls(path=path, manifest=manifest, manifest_bytes=data, trusted_by=trusted_by)

    @property
    def manifest_digest(self) -> str:
        """SHA-256 of `manifest.json` in hexadecimal. It covers everything, while the set digest covers only files."""
        return hashlib.sha256(self.manifest_bytes).hexdigest()

    def check_sealed(self, *, strict: bool) -> None:
        """Warn if a change of the manifest would not be noticed, or refuse it.

        A manifest of schema 1 or 2 has no digest of itself. A signature or an expected digest covers it too.

        Raises:
            IntegrityError: `strict` is set.
        """
        if self.manifest.schema >= FIRST_SEALED_SCHEMA or self.trusted_by:
            return
        problem = (
            f"{self.path / MANIFEST_NAME} has schema {self.manifest.schema}, which has no digest of the manifest, so a "
            "change of it is not noticed"
        )
        if strict:
            digest = "give its digest with --expect-digest, in Python as `Trust(expected_digest=…)`"
            raise IntegrityError(problem, next_step=f"{BAKE_AGAIN}, or {digest}")
        logger.warning("%s; bake the warm state again", problem)

    @property
    def key(self) -> str:
        """The name of the machine and software that the state is for; see `state_key`."""
        return state_key(self.manifest)

    def find_signature(self) -> Path | None:
        """Return the signature next to the state, or None if there is none.

        Raises:
            IntegrityError: it is the signature of another state.
        """
        path = default_signature(self.path)
        if not path.is_file():
            return None
        check_same_state(path, self.path, self.manifest_bytes)
        return path

    def check_folder(self) -> None:
        """Refuse unlisted files, links, empty folders, and paths that other users own or can write.

        An unlisted file means that someone else wrote here.

        Raises:
            IntegrityError: naming the first paths.
        """
        root = self.path
        listed = {file.path for file in self.manifest.files} | {MANIFEST_NAME}
        present = set(walk_files(root, root))
        parents = {str(parent) for name in present | listed for parent in PurePosixPath(name).parents}
        for directory, _, _ in os.walk(root):
            if (folder := Path(directory).relative_to(root).as_posix()) not in parents | {"."}:
                raise IntegrityError(
                    f"{root} holds a folder without files: {folder}", next_step=f"remove it, or {BAKE_AGAIN}"
                )
        if extra := sorted(present - listed):
            raise IntegrityError(
                f"{root} holds {len(extra)} file(s) that its manifest does not list, the first: {extra[0]}",
                next_step="move them out of that folder; a bake does not replace a state with such files",
            )
        directories = {root, *(root / parent for path in present for parent in PurePosixPath(path).parents)}
        refuse_changeable(root, (*sorted(directories), *(root / name for name in sorted(present))))

    def check_files(self) -> None:
        """Compare size and digest of every file with the manifest.

        Raises:
            IntegrityError: naming every file that differs.
        """
        if problems := verify_files(self.manifest.files, self.path):
            raise IntegrityError(
                f"{len(problems)} file(s) of {self.path} differ from the manifest: {'; '.join(problems)}",
                next_step=f"restore the warm state, or {BAKE_AGAIN}",
            )

    def compatibility(
        self, facts: Mapping[str, str], *, device: str | None = None, profile: str | None = None
    ) -> Compatibility:
        """Compare what the families require with the facts of a machine.

        Args:
            facts: as `machine_facts` returns them.
            device: the device of the start; by default the one that the state was baked for.
            profile: the requested profile; by default the one that the state was baked for.
        """
        manifest = self.manifest
        found = compatibility_of(
            self.path.absolute().name,
            {name: words for name, words in compare_families(manifest, facts).items() if name in FAMILIES},
            {family.name: family.size for family in manifest.families},
            baked=(manifest.reference.device, manifest.execution.profile),
            start=(device, profile),
        )
        return replace(found, cross_compiled=manifest.cross_compiled)


def state_key(manifest: Manifest) -> str:
    """Name the machine and the software that a state is for; the result can be used as a file name.

    It consists of the device, the GPU or processor architecture, the compute capability, the driver if a family
    depends on it, the torch version, the profile, and T3's dtype if it is not float32. Then follow 12 digits of a
    SHA-256 over the execution, the variant, and every fact of machine and software that a family depends on. Two bakes
    for the same machine and software have the same key. Two profiles for one GPU are two states, because a start may
    ask for either.
    """
    required = {
        (name, value)
        for family in manifest.families
        for name, value in family.requires.items()
        if not name.startswith("source:") and name not in _NOT_IN_KEY
    }
    device, fingerprint = device_kind(manifest.reference.device), manifest.fingerprint
    execution = manifest.execution
    parts = [device]
    if device == "cuda":
        parts += [fingerprint.get("gpu", ABSENT), "cc" + fingerprint.get("compute_capability", ABSENT)]
        parts += ["driver" + fingerprint.get("driver", ABSENT)] * any(name == "driver" for name, _ in required)
    else:
        parts.append(fingerprint.get("arch", ABSENT))
    parts += ["torch" + fingerprint.get("torch", ABSENT), execution.profile]
    parts += [execution.t3_dtype] * (execution.t3_dtype != "float32")
    text = json.dumps([[execution.profile, execution.t3_dtype, execution.graphs], manifest.variant, sorted(required)])
    parts.append(hashlib.sha256(text.encode()).hexdigest()[:12])
    return "-".join(_slug(part) for part in parts)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.") or ABSENT
