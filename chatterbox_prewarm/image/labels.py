"""Labels: what a finished image says about its warm states, so that a node can be judged before it pulls a byte.

One label for each property, for people and policies, and `io.chatterbox-prewarm.states`, compact JSON, for this
project: of every state its key, what it is, and what each family requires of a machine and its software.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.state.folder import key_of
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION, Measurements
from chatterbox_prewarm.system.fingerprint import device_kind
from chatterbox_prewarm.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chatterbox_prewarm.state.manifest import Manifest

PREFIX = "io.chatterbox-prewarm."
STATES = f"{PREFIX}states"
#: The digest of the evidence that the image, with just the states that it has, was proven by.
EVIDENCE = f"{PREFIX}evidence"
#: Of the label `states`, apart from the manifest's.
STATES_SCHEMA = 1
_OCI = "org.opencontainers.image."
#: What a label holds for a property that a state has not, such as the GPU of one for a CPU.
_NONE = "none"
#: A number of a label is below it: seconds, or bytes.
_MOST = 1 << 50
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class FamilyLabel:
    """A cache family of a state: its bytes, and the facts that its reuse depends on, but those of single files."""

    name: str
    size: int
    requires: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class StateLabel:
    """A state of an image, as far as its labels tell; `device` is the kind that it was baked for.

    `gpu`, `compute_capability` and `driver` are "none" for a state that was baked for a CPU. `made_of` is a SHA-256
    over what the bake was given, weights and parameters with the clips of voices, since two bakes of the same need not
    give one set digest: a compiler may give other bytes. It is empty in the labels of an older version, and `measured`
    is all 0.
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
    made_of: str = ""
    measured: Measurements = field(default_factory=Measurements)


#: The fields of a state that are text, in the label as in the class.
_TEXTS = tuple(one.name for one in fields(StateLabel) if one.name not in {"families", "made_of", "measured"})


def labels_of(
    manifests: Sequence[Manifest],
    *,
    beside: Sequence[StateLabel] = (),
    created: str | None = None,
    base_name: str = "",
    base_digest: str = "",
) -> dict[str, str]:
    """The labels of an image that holds these states.

    Where states differ in a property, its label holds all values, each once, in the order of the states' keys, joined
    by a comma and a space.

    Args:
        manifests: of the states, at least one.
        beside: the states that the image has already.
        created: when the image was made, as RFC 3339 has it; by default when the newest state was baked, so that the
            same states give the same labels.
        base_name: the reference of the image that the states were added to, if it is known.
        base_digest: the digest of its manifest.

    Raises:
        BadInputError: there is no state, or two have one key, and so one folder in the image.
    """
    if not manifests:
        raise BadInputError("an image without a warm state has no labels", next_step="name at least one state")
    found = [*beside, *map(label_of, manifests)]
    states = {state.key: state for state in found}
    if len(states) != len(found):
        raise BadInputError(
            "two of the states are for one machine, one software and one profile", next_step="leave one of them out"
        )
    ordered = [states[key] for key in sorted(states)]

    def joined(value: Callable[[StateLabel], str]) -> str:
        return ", ".join(dict.fromkeys(map(value, ordered)))

    standard = {
        "title": "chatterbox-prewarm",
        "description": "Chatterbox TTS with its warm state baked in",
        "version": __version__,
        "licenses": "MIT",
        "created": created or max(state.created for state in ordered),
        "base.name": base_name,
        "base.digest": base_digest,
    }
    return {
        **{f"{_OCI}{name}": value for name, value in standard.items() if value},
        f"{PREFIX}schema": str(SCHEMA_VERSION),
        f"{PREFIX}variant": joined(lambda state: state.variant),
        f"{PREFIX}profile": joined(lambda state: state.profile),
        f"{PREFIX}gpu": joined(lambda state: state.gpu),
        f"{PREFIX}compute-capability": joined(lambda state: state.compute_capability),
        f"{PREFIX}driver": joined(lambda state: state.driver),
        f"{PREFIX}torch": joined(lambda state: state.torch),
        f"{PREFIX}set-digest": joined(lambda state: state.set_digest),
        STATES: _dump({"schema": STATES_SCHEMA, "states": [_state(found) for found in ordered]}),
    }


def read_states(labels: Mapping[str, str]) -> tuple[StateLabel, ...]:
    """Read the states that an image's labels tell of.

    Raises:
        EngineError: there is no such label, it is malformed, or of a newer schema.
    """
    if STATES not in labels:
        raise EngineError(
            f"the image has no label {STATES}, so it does not say which nodes would hit",
            next_step="check the reference; label it by adding its warm state with this version",
        )
    try:
        return _parse(json.loads(labels[STATES]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"the label {STATES} is malformed: {error!r}", next_step="build the image again, or check who changed it"
        ) from error


def _parse(raw: Mapping[str, Any]) -> tuple[StateLabel, ...]:
    schema = raw["schema"]
    if type(schema) is not int or schema < 1:
        raise ValueError(f"its schema is {schema!r}")
    if schema > STATES_SCHEMA:
        raise EngineError(
            f"the label {STATES} is of schema {schema}; this version reads up to {STATES_SCHEMA}",
            next_step="upgrade chatterbox-prewarm",
        )
    states = tuple(_parse_state(entry) for entry in raw["states"])
    if not states or len({state.key for state in states}) != len(states):
        raise ValueError("it tells of no state, or of one twice")
    return states


def label_of(manifest: Manifest) -> StateLabel:
    """What the labels of an image tell of a state."""
    given = [manifest.weights.set_digest, dict(manifest.provenance.parameters)]
    device, fingerprint = device_kind(manifest.reference.device), manifest.fingerprint
    of_gpu = fingerprint if device == "cuda" else {}
    return StateLabel(
        key=key_of(manifest),
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
        made_of=hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest(),
        measured=manifest.measured,
    )


def _state(state: StateLabel) -> dict[str, Any]:
    families = {family.name: {"bytes": family.size, "requires": family.requires} for family in state.families}
    made_of = {"made_of": state.made_of} if state.made_of else {}
    measured = {"measured": asdict(state.measured)} if state.measured != Measurements() else {}
    return {**{name: getattr(state, name) for name in _TEXTS}, **made_of, **measured, "families": families}


def _parse_state(raw: Mapping[str, Any]) -> StateLabel:
    families = []
    for name, family in raw["families"].items():
        size, requires = family["bytes"], family["requires"]
        if type(size) is not int or size < 0:
            raise ValueError(f"the bytes of {name} are {size!r}")
        families.append(
            FamilyLabel(name=name, size=size, requires={_text(fact): _text(requires[fact]) for fact in requires})
        )
    if not _SHA256.fullmatch(_text(raw["set_digest"])):
        raise ValueError(f"{raw['set_digest']!r} is no set digest")
    return StateLabel(
        **{name: _text(raw[name]) for name in _TEXTS},
        families=tuple(families),
        made_of=_text(raw.get("made_of", "")),
        measured=_parse_measured(raw.get("measured", {})),
    )


def _parse_measured(raw: Mapping[str, Any]) -> Measurements:
    """What is known of it here; a newer version may have measured more."""
    found = {name: raw[name] for name in raw.keys() & {one.name for one in fields(Measurements)}}
    for name, value in found.items():
        if type(value) not in {int, float} or not 0 <= value < _MOST:
            raise ValueError(f"{name} is {value!r}")
    return Measurements(**found)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _dump(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
