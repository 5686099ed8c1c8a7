"""Write small warm states, manifests and checkpoints without a bake."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.state.manifest import (
    MANIFEST_NAME,
    FamilyEntry,
    Manifest,
    Measurements,
    Provenance,
    Reference,
    WeightsEntry,
)
from chatterbox_prewarm.state.manifest_file import write_manifest
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.digests import FileEntry, scan, set_digest
from chatterbox_prewarm.weights.record import RECORD_NAME, WeightsRecord
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

#: Requirements that the machine of this test run meets, for families that must fit.
FITTING = {"arch": platform.machine()}

REFERENCE = Reference(
    text="Grüße — a «reference».",
    voice="default",
    seed=7,
    max_new_tokens=12,
    threads=2,
    device="cpu",
    sample_rate=24000,
    samples=960,
    tokens_sha256="0" * 64,
    pcm_sha256="1" * 64,
)
PROVENANCE = Provenance(
    source="3" * 64,
    packages="4" * 64,
    revision="b" * 40,
    base_image="debian@sha256:" + "5" * 64,
    builder="tests",
    parameters={"device": "cpu", "levels": "1,2,3"},
)
MEASURED = Measurements(cold_seconds=24.5, ready_seconds=12.25, resident_bytes=4_500_000_000)
WEIGHTS = WeightsEntry(repository="someone/voice", revision="a" * 40, set_digest="2" * 64, files=())


def make_checkpoint(directory: Path) -> Path:
    """Write tiny files with the names of the English checkpoint, without a record."""
    directory.mkdir()
    for index, name in enumerate(ENGLISH.safetensors):
        save_file({"w": np.full((2, 3), index, np.float32), "n": np.arange(4, dtype=np.int64)}, directory / name)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "conds.pt").write_bytes(b"a voice that no test reads")
    return directory


def make_state(
    root: Path, families: Mapping[str, Mapping[str, bytes]], requires: Mapping[str, Mapping[str, str]] | None = None
) -> Manifest:
    """Write a warm state with files of mode 0644, and return its manifest.

    Args:
        root: the directory of the state; it must not exist.
        families: for each family, the content of its files by their path in the family's folder.
        requires: the requirements of some families; `FITTING` for all others.
    """
    root.mkdir(mode=0o755)
    entries = []
    for name, files in families.items():
        (root / name).mkdir(mode=0o755)
        for path, content in files.items():
            target = root / name / path
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod(0o644)
        entries.append(
            FamilyEntry(
                name=name,
                requires=dict((requires or {}).get(name, FITTING)),
                files=scan(root, below=name),
                seconds_spent=1.5,
                seconds_saved=1.25,
            )
        )
    manifest = make_manifest(entries)
    write_manifest(manifest, root)
    return manifest


def make_state_for(
    root: Path,
    facts: Mapping[str, str],
    *,
    device: str = "cuda",
    profile: str = "aot",
    code: bytes = b"machine code",
) -> Manifest:
    """Write a warm state for the machine with these facts, and return its manifest.

    The state has a family that only needs the right architecture. If the profile is `aot`, it also has a compiled
    family that needs all of the facts.

    Args:
        root: the directory of the state; its parent is created if it is missing.
        facts: the facts of the machine. The fingerprint of the state contains them.
        device: the device of the reference synthesis.
        profile: the profile of the execution.
        code: the content of the compiled file.
    """
    root.parent.mkdir(mode=0o755, exist_ok=True)
    families = {"numba": {"librosa/filters.nbi": b"index"}, "aot": {"region.so": code}}
    requires = {"numba": {"arch": facts["arch"]}, "aot": {**facts, "device": device}}
    if profile != "aot":
        del families["aot"]
    make_state(root, families, requires)

    def change(raw: dict[str, Any]) -> None:
        raw["reference"]["device"] = device
        raw["execution"]["profile"] = profile
        raw["fingerprint"] = {"torch": "2.6.0", **facts}

    rewrite(root, change)
    return State.read(root).manifest


def rewrite(root: Path, change: Callable[[dict[str, Any]], object] = lambda _: None, *, rescan: bool = False) -> None:
    """Change the manifest of a state and give it a correct digest, so that it reads like one that a bake wrote.

    Args:
        root: the directory of the state.
        change: a function that changes the fields of the manifest.
        rescan: replace the recorded files by the files that are on disk.
    """
    raw = json.loads((root / MANIFEST_NAME).read_text(encoding="utf-8"))
    change(raw)
    if rescan:
        for family in raw["families"]:
            family["files"] = [vars(entry) for entry in scan(root, below=family["name"])]
        files = [FileEntry(**entry) for family in raw["families"] for entry in family["files"]]
        raw["set_digest"] = set_digest(files)
    raw.pop("digest")
    raw["digest"] = hashlib.sha256(_canonical(raw).encode()).hexdigest()
    (root / MANIFEST_NAME).chmod(0o644)
    (root / MANIFEST_NAME).write_text(_canonical(raw), encoding="utf-8")


def mark_cross_compiled(root: Path) -> None:
    """Change the manifest of a state so that it says that the state was compiled on a machine without its GPU."""

    def change(raw: dict[str, Any]) -> None:
        raw["cross_compiled"] = True
        raw["reference"].update(samples=0, tokens_sha256="", pcm_sha256="")

    rewrite(root, change)


def _canonical(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def make_manifest(families: list[FamilyEntry]) -> Manifest:
    """Return a manifest of these families with a correct set digest; all other fields are made up."""
    manifest = Manifest(
        tool="chatterbox-prewarm 0.1.0",
        created="2025-01-02T03:04:05+00:00",
        variant="english",
        execution=Execution(profile="eager"),
        levels=(1, 2, 3),
        warmup_texts=("One.", "Grüße."),
        weights=WEIGHTS,
        fingerprint={"arch": "x86_64", "python": "cpython-311 3.11.7"},
        families=tuple(families),
        voices=("default", "second"),
        reference=REFERENCE,
        provenance=PROVENANCE,
        measured=MEASURED,
    )
    return replace(manifest, set_digest=set_digest(manifest.files))


def record_weights(directory: Path) -> str:
    """Write the record of a checkpoint without files, and return its set digest."""
    directory.mkdir(exist_ok=True)
    record = WeightsRecord(variant="english", repository="none", revision="none", synthetic=None, files=())
    (directory / RECORD_NAME).write_text(json.dumps(asdict(record)))
    return record.set_digest
