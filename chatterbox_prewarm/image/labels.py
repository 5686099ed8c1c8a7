"""Labels of a finished image, which tell whether a node would hit before it pulls anything.

There is one label for each property, for people and policies, and `io.chatterbox-prewarm.states`, compact JSON for this
project: the key and the properties of every state, and what each of its families requires of a machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION, Measurements
from chatterbox_prewarm.state.state import state_key
from chatterbox_prewarm.system.fingerprint import device_kind
from chatterbox_prewarm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatterbox_prewarm.state.manifest import Manifest

PREFIX = "io.chatterbox-prewarm."
STATES = f"{PREFIX}states"
#: The set of Python packages of an image, "lean" or "full". The Dockerfile sets it; other bases have no such label.
PACKAGES = f"{PREFIX}packages"
#: Digest of the evidence that proved the image with exactly the states that it contains.
EVIDENCE = f"{PREFIX}evidence"
#: Schema of the label `states`. It is independent of the manifest's schema.
STATES_SCHEMA = 1
_OCI = "org.opencontainers.image."
#: Properties with a label for people: the fields of `StateLabel`, with "-" instead of "_".
_PROPERTIES = ("variant", "profile", "gpu", "compute-capability", "driver", "torch", "set-digest")
#: Value of a property that a state does not have, such as the GPU of a state for a CPU.
_NONE = "none"
#: Seconds and bytes in a label must be below this number.
_LIMIT = 1 << 50
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FamilyLabel:
    """A cache family of a state: its size in bytes, and the facts that it requires, except those of single files."""

    name: str
    size: int
    requires: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class StateLabel:
    """A state of an image, as its label describes it.

    Attributes:
        device: kind of device that the state was baked for, "cpu" or "cuda".
        gpu, compute_capability, driver: "none" for a state that was baked for a CPU.
        inputs_digest: SHA-256 over the inputs of the bake, that is weights, parameters and voice clips. Two bakes from
            the same inputs may have different set digests, because compilers may produce different bytes. Empty in the
            labels of older versions.
        measured: all 0 in the labels of older versions.
        cross_compiled: the state was compiled for a GPU on a machine without one.
        proven: the image has evidence of a proof on that GPU. Labels never say this; `image_with_states` adds it.
    """

    key: str
    set_digest: str
    variant: str
    profile: str
    device: str
    created: str
    gpu: str
    compute_capability: str
    driver: str
    torch: str
    families: tuple[FamilyLabel, ...]
    inputs_digest: str = ""
    measured: Measurements = field(default_factory=Measurements)
    cross_compiled: bool = False
    proven: bool = False


_NO_TEXTS = {"families", "inputs_digest", "measured", "cross_compiled", "proven"}
#: Fields of a state that are text and have the same name in the JSON document.
_TEXTS = tuple(one.name for one in fields(StateLabel) if one.name not in _NO_TEXTS)


def image_labels(
    manifests: Sequence[Manifest],
    *,
    existing: Sequence[StateLabel] = (),
    base_name: str = "",
    base_digest: str = "",
) -> dict[str, str]:
    """Return the labels of an image that contains these states.

    If states differ in a property, its label has every value once, in the order of the states' keys, separated by a
    comma and a space. The creation time is the time of the newest bake, so that the same states give the same labels.

    Args:
        manifests: manifests of the new states, at least one.
        existing: the states that the image already contains.
        base_name: reference of the image that the states were added to, or "".
        base_digest: digest of that image's manifest, or "".

    Raises:
        BadInputError: there is no state, or two states have the same key and therefore the same folder in the image.
    """
    if not manifests:
        raise BadInputError("an image without a warm state has no labels", next_step="name at least one state")
    labels = [*existing, *map(state_label, manifests)]
    states = sorted({label.key: label for label in labels}.values(), key=lambda label: label.key)
    if len(states) != len(labels):
        raise BadInputError(
            "two of the states are for the same machine, software and profile", next_step="leave one of them out"
        )
    standard = {
        "title": "chatterbox-prewarm",
        "description": "Chatterbox TTS with its warm state baked in",
        "version": __version__,
        "licenses": "MIT",
        "created": max(state.created for state in states),
        "base.name": base_name,
        "base.digest": base_digest,
    }
    properties = {
        name: ", ".join(dict.fromkeys(getattr(state, name.replace("-", "_")) for state in states))
        for name in _PROPERTIES
    }
    document = {"schema": STATES_SCHEMA, "states": [_state_to_json(state) for state in states]}
    return {
        **{f"{_OCI}{name}": value for name, value in standard.items() if value},
        f"{PREFIX}schema": str(SCHEMA_VERSION),
        **{f"{PREFIX}{name}": value for name, value in properties.items()},
        STATES: json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False),
    }


def variants_of(text: str) -> list[str]:
    """Return the variants that a label or a build argument names, separated by commas."""
    return [name for part in text.split(",") if (name := part.strip())]


def state_label(manifest: Manifest) -> StateLabel:
    """Describe a state as the labels of an image do."""
    inputs = [manifest.weights.set_digest, dict(manifest.provenance.parameters)]
    device, fingerprint = device_kind(manifest.reference.device), manifest.fingerprint
    of_gpu = fingerprint if device == "cuda" else {}
    return StateLabel(
        key=state_key(manifest),
        set_digest=manifest.set_digest,
        variant=manifest.variant,
        profile=manifest.execution.profile,
        device=device,
        created=manifest.created,
        gpu=of_gpu.get("gpu", _NONE),
        compute_capability=of_gpu.get("compute_capability", _NONE),
        driver=of_gpu.get("driver", _NONE),
        torch=fingerprint.get("torch", _NONE),
        families=tuple(
            FamilyLabel(
                name=family.name,
                size=family.size,
                requires={name: value for name, value in family.requires.items() if not name.startswith("source:")},
            )
            for family in manifest.families
        ),
        inputs_digest=hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(),
        measured=manifest.measured,
        cross_compiled=manifest.cross_compiled,
    )


def read_states(labels: Mapping[str, str]) -> tuple[StateLabel, ...]:
    """Read the states that an image's labels describe.

    Raises:
        EngineError: the label is missing or malformed, or has a newer schema.
    """
    if STATES not in labels:
        raise EngineError(
            f"the image has no label {STATES}, so it is unknown which nodes would hit",
            next_step="check the reference. The states of a plain `docker build` are read from the image itself, in a "
            "registry or in a file of `docker save`: leave out --labels",
        )
    try:
        return _parse(json.loads(labels[STATES]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"the label {STATES} is malformed: {error!r}", next_step="rebuild the image, or check who changed the label"
        ) from error


def _parse(raw: Mapping[str, Any]) -> tuple[StateLabel, ...]:
    schema = raw["schema"]
    if type(schema) is not int or schema < 1:
        raise ValueError(f"its schema is {schema!r}")
    if schema > STATES_SCHEMA:
        raise EngineError(
            f"the label {STATES} has schema {schema}, but this version reads schemas up to {STATES_SCHEMA}",
            next_step="upgrade chatterbox-prewarm",
        )
    states = tuple(_parse_state(entry) for entry in raw["states"])
    if not states or len({state.key for state in states}) != len(states):
        raise ValueError("it describes no state, or the same state twice")
    return states


def _state_to_json(state: StateLabel) -> dict[str, Any]:
    families = {family.name: {"bytes": family.size, "requires": family.requires} for family in state.families}
    document = {name: getattr(state, name) for name in _TEXTS} | {"families": families}
    if state.inputs_digest:
        document["made_of"] = state.inputs_digest
    if state.measured != Measurements():
        document["measured"] = asdict(state.measured)
    if state.cross_compiled:
        document["cross_compiled"] = True
    return document


def _parse_state(raw: Mapping[str, Any]) -> StateLabel:
    families = []
    for name, family in raw["families"].items():
        size, requires = family["bytes"], family["requires"]
        if type(size) is not int or size < 0:
            raise ValueError(f"the size of {name} is {size!r} bytes")
        families.append(
            FamilyLabel(name=name, size=size, requires={_text(fact): _text(requires[fact]) for fact in requires})
        )
    if not _SHA256.fullmatch(_text(raw["set_digest"])):
        raise ValueError(f"{raw['set_digest']!r} is not a set digest")
    return StateLabel(
        **{name: _text(raw[name]) for name in _TEXTS},
        families=tuple(families),
        inputs_digest=_text(raw.get("made_of", "")),
        measured=_parse_measured(raw.get("measured", {})),
        cross_compiled=raw.get("cross_compiled", False) is True,
        proven=raw.get("proven", False) is True,
    )


def _parse_measured(raw: Mapping[str, Any]) -> Measurements:
    """Read the measurements that this version knows; a newer version may have added others."""
    measured = {name: raw[name] for name in raw.keys() & {one.name for one in fields(Measurements)}}
    for name, value in measured.items():
        if type(value) not in {int, float} or not 0 <= value < _LIMIT:
            raise ValueError(f"{name} is {value!r}")
    return Measurements(**measured)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
