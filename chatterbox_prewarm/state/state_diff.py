"""Describe the differences between two warm states, given their manifests."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.fingerprint import ABSENT, contrast, describe_fact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from chatterbox_prewarm.model.profiles import Execution
    from chatterbox_prewarm.state.manifest import FamilyEntry, Manifest, Reference

#: How many changed files are named.
_MAX_NAMED = 3


def differences(one: Manifest, other: Manifest) -> list[str]:
    """List the differences of the second manifest from the first, a line each; empty if there are none.

    The order is: weights, variant, execution, fingerprint, families with their bytes, files and requirements, voices,
    reference synthesis. Ignored are the time, the version, the texts and the duration of the bake.
    """
    return [
        *_weights(one, other),
        *_changed("variant", one.variant, other.variant),
        *_fields("execution", one.execution, other.execution),
        *_facts("", one.fingerprint, other.fingerprint),
        *(line for name in _names(one, other) for line in _family(name, one.family(name), other.family(name))),
        *_only("voices", one.voices, other.voices),
        *_fields("reference", one.reference, other.reference),
        *_changed("compiled without the GPU", str(one.cross_compiled), str(other.cross_compiled)),
    ]


def _changed(what: str, one: str, other: str) -> list[str]:
    if one == other:
        return []
    before, after = contrast(one, other)
    return [f"{what}: {before} → {after}"]


def _only(what: str, one: Iterable[str], other: Iterable[str]) -> list[str]:
    removed, added = sorted({*one} - {*other}), sorted({*other} - {*one})
    return [
        f"{what}: {count} {kind}: {names}" for count, kind, names in _counts(("removed", removed), ("added", added))
    ]


def _counts(*kinds: tuple[str, list[str]]) -> Iterator[tuple[int, str, str]]:
    for kind, names in kinds:
        if names:
            more = ", ..." if len(names) > _MAX_NAMED else ""
            yield len(names), kind, ", ".join(names[:_MAX_NAMED]) + more


def _weights(one: Manifest, other: Manifest) -> list[str]:
    before, after = one.weights, other.weights
    return [
        *_changed("weights: repository", before.repository, after.repository),
        *_changed("weights: revision", before.revision, after.revision),
        *_changed("weights: set digest", before.set_digest, after.set_digest),
    ]


def _facts(prefix: str, one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """List the facts that differ, in the order of the first, followed by facts that only the second has."""
    return [
        line
        for name in dict.fromkeys([*one, *other])
        for line in _changed(f"{prefix}{describe_fact(name)}", one.get(name, ABSENT), other.get(name, ABSENT))
    ]


def _names(one: Manifest, other: Manifest) -> list[str]:
    return list(dict.fromkeys(family.name for family in (*one.families, *other.families)))


def _family(name: str, one: FamilyEntry | None, other: FamilyEntry | None) -> list[str]:
    if one is None or other is None:
        family, which = (one, "first") if one is not None else (other, "second")
        size = 0 if family is None else family.size
        return [f"{name}: only in the {which} state, {size:,} bytes"]
    before, after = ({file.path: file.sha256 for file in family.files} for family in (one, other))
    changed = sorted(path for path in {*before} & {*after} if before[path] != after[path])
    return [
        *_changed(f"{name}: bytes", f"{one.size:,}", f"{other.size:,}"),
        *_only(f"{name}: files", before, after),
        *(f"{name}: files: {count} {kind}: {names}" for count, kind, names in _counts(("changed", changed))),
        *_facts(f"{name}: requires ", one.requires, other.requires),
    ]


def _fields(what: str, one: Execution | Reference, other: Execution | Reference) -> list[str]:
    """List the fields in which two records differ."""
    return [
        line
        for field in fields(one)
        for line in _changed(f"{what}: {field.name}", str(getattr(one, field.name)), str(getattr(other, field.name)))
    ]
