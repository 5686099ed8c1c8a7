"""Copies of a warm state with one change."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.bench.executions import voice_of
from chatterbox_prewarm.state.manifest_file import write_manifest
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.system.atomic_files import remove
from chatterbox_prewarm.system.digests import scan, set_digest

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest


def without_family(state: Path, name: str, target: Path) -> Path:
    """Copy a state to `target` without one family."""
    manifest = _copy(state, target)
    shutil.rmtree(target / name, ignore_errors=True)
    families = tuple(family for family in manifest.families if family.name != name)
    return _write(replace(manifest, families=families), target)


def with_voices(state: Path, count: int, target: Path) -> Path:
    """Copy a state to `target` with `count` voices: the built-in one, and copies of it under other names."""
    manifest = _copy(state, target)
    voice = voice_of(target)
    names = [f"copy-{number}" for number in range(1, count)]
    for name in names:
        shutil.copyfile(voice, voice.with_name(f"{name}.safetensors"))
    families = tuple(
        replace(family, files=scan(target, below=family.name)) if family.name == "conditionals" else family
        for family in manifest.families
    )
    return _write(replace(manifest, families=families, voices=tuple(sorted({*manifest.voices, *names}))), target)


def _copy(state: Path, target: Path) -> Manifest:
    """Copy a state, writable for its owner only."""
    manifest = State.read(state).manifest
    if target.exists():
        remove(target)
    shutil.copytree(state, target)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return manifest


def _write(manifest: Manifest, target: Path) -> Path:
    write_manifest(replace(manifest, set_digest=set_digest(manifest.files)), target)
    return target
