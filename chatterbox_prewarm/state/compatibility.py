"""Fit: which families of a warm state this machine may use, and in words why not the others."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from chatterbox_prewarm.errors import WeightsError
from chatterbox_prewarm.system.fingerprint import ABSENT, device_kind, explain, package_digest, read_fingerprint
from chatterbox_prewarm.weights.record import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from chatterbox_prewarm.state.manifest import Manifest

logger = logging.getLogger(__name__)


def facts(weights: Path, cache: Path, device: str) -> dict[str, str]:
    """What a family's reuse may depend on besides source files: the machine, its software, weights, places, device."""
    known = read_fingerprint(device).fields() | {
        "cache": str(cache.resolve()),
        "device": device_kind(device),
        "regions": package_digest("chatterbox_prewarm.model.regions"),
    }
    try:
        record = read_record(weights)
    except WeightsError as error:
        logger.warning("%s", error.message)
        return known
    return known | {"weights": record.set_digest, "variant": record.variant}


def check_fit(manifest: Manifest, known: Mapping[str, str]) -> dict[str, list[str]]:
    """Compare each family's requirements with the present `facts`.

    Returns:
        for every family the differences in words; an empty list means that it fits.
    """
    return {entry.name: explain(entry.requires, current_facts(entry.requires, known)) for entry in manifest.families}


def current_facts(keys: Iterable[str], machine: Mapping[str, str]) -> dict[str, str]:
    """The present values of the facts named by `keys`.

    Args:
        keys: fields of a fingerprint, or `source:PATH` for the size and modification time of a source file.
        machine: the fingerprint's fields, with what else a family may depend on beside them, as `fit.facts` gives it.
    """
    return {
        key: _stamp(Path(key.removeprefix("source:"))) if key.startswith("source:") else machine.get(key, ABSENT)
        for key in keys
    }


def _stamp(path: Path) -> str:
    """Modification time and size as Numba compares them, to the last digit of the time."""
    try:
        stat = path.stat()
    except OSError:
        return ABSENT
    return f"{stat.st_size} bytes, modified at {stat.st_mtime!r}"
