"""An image's labels: what they say, that they are read back as they were written, and how small they are."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.labels import STATES, label_of, labels_of, read_states
from chatterbox_prewarm.state.folder import key_of
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION, Measurements
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.version import __version__
from tests.helpers.states import MEASURED, make_manifest, make_state_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest

H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "550.54.15"}
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "550.54.15"}
#: The labels of DESIGN.md.
NAMES = {
    f"io.chatterbox-prewarm.{name}"
    for name in ("schema", "variant", "profile", "gpu", "compute-capability", "driver", "torch", "set-digest")
}


@pytest.fixture
def three(tmp_path: Path) -> list[Manifest]:
    """For an H100, an L4, and a CPU."""
    return [
        make_state_for(tmp_path / "h100", H100, code=b"1"),
        make_state_for(tmp_path / "l4", L4, code=b"22"),
        make_state_for(tmp_path / "cpu", {"arch": "x86_64"}, device="cpu", profile="eager"),
    ]


def test_the_labels_of_one_state_say_what_it_is_for(three: list[Manifest]) -> None:
    labels = labels_of(three[:1], base_name="registry.example.com/speech:1", base_digest="sha256:" + "a" * 64)
    assert labels.pop(STATES)
    assert labels == {
        "io.chatterbox-prewarm.schema": str(SCHEMA_VERSION),
        "io.chatterbox-prewarm.variant": "english",
        "io.chatterbox-prewarm.profile": "aot",
        "io.chatterbox-prewarm.gpu": "NVIDIA H100",
        "io.chatterbox-prewarm.compute-capability": "9.0",
        "io.chatterbox-prewarm.driver": "550.54.15",
        "io.chatterbox-prewarm.torch": "2.6.0",
        "io.chatterbox-prewarm.set-digest": three[0].set_digest,
        "org.opencontainers.image.title": "chatterbox-prewarm",
        "org.opencontainers.image.description": "Chatterbox TTS with its warm state baked in",
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.licenses": "MIT",
        "org.opencontainers.image.created": "2025-01-02T03:04:05+00:00",
        "org.opencontainers.image.base.name": "registry.example.com/speech:1",
        "org.opencontainers.image.base.digest": "sha256:" + "a" * 64,
    }


def test_the_values_of_several_are_joined_in_the_order_of_their_keys_each_once(three: list[Manifest]) -> None:
    labels = labels_of(three)
    assert labels.keys() >= NAMES
    of = {name.rpartition(".")[2]: labels[name] for name in NAMES}
    assert of["gpu"] == "none, NVIDIA H100, NVIDIA L4"
    assert of["compute-capability"] == "none, 9.0, 8.9"
    assert of["driver"] == "none, 550.54.15"
    assert of["profile"] == "eager, aot"
    assert of["set-digest"] == ", ".join(three[index].set_digest for index in (2, 0, 1))
    assert labels_of(three[::-1]) == labels


def test_what_is_written_is_read_back(three: list[Manifest]) -> None:
    states = read_states(labels_of(three))
    assert [state.key for state in states] == sorted(map(key_of, three))
    by_key = {state.key: state for state in states}
    for manifest in three:
        state = by_key[key_of(manifest)]
        assert (state.set_digest, state.variant) == (manifest.set_digest, manifest.variant)
        assert (state.profile, state.device) == (manifest.execution.profile, manifest.reference.device)
        assert {family.name: (family.size, dict(family.requires)) for family in state.families} == {
            family.name: (family.size, family.requires) for family in manifest.families
        }


def test_what_a_state_was_made_of_is_its_weights_and_parameters_not_its_bytes(three: list[Manifest]) -> None:
    made = label_of(three[0]).made_of
    assert label_of(replace(three[0], set_digest="9" * 64, created="2030-01-01T00:00:00+00:00")).made_of == made
    assert label_of(replace(three[0], weights=replace(three[0].weights, set_digest="9" * 64))).made_of != made
    voice = replace(three[0].provenance, parameters={**three[0].provenance.parameters, "voice:fox": "sha256:1"})
    assert label_of(replace(three[0], provenance=voice)).made_of != made
    labels = labels_of(three[:1])
    (state,) = read_states(labels)
    assert state.made_of == made
    older = json.loads(labels[STATES])
    del older["states"][0]["made_of"]
    assert read_states({STATES: json.dumps(older)}) == (replace(state, made_of=""),)


def test_what_the_bake_measured_is_read_back_as_far_as_this_version_knows_it(three: list[Manifest]) -> None:
    labels = labels_of(three[:1])
    (state,) = read_states(labels)
    assert state.measured == three[0].measured == MEASURED
    raw = json.loads(labels[STATES])
    raw["states"][0]["measured"]["watts"] = "many"
    assert read_states({STATES: json.dumps(raw)}) == (state,)
    del raw["states"][0]["measured"]
    assert read_states({STATES: json.dumps(raw)}) == (replace(state, measured=Measurements()),)


def test_facts_of_single_files_are_left_out_since_those_are_in_the_image(three: list[Manifest]) -> None:
    numba = replace(three[0].families[0], requires={"arch": "x86_64", "source:/x.py": "6 bytes"})
    (state,) = read_states(labels_of([replace(three[0], families=(numba,))]))
    assert state.families[0].requires == {"arch": "x86_64"}


def test_the_label_of_a_state_that_depends_on_everything_stays_small() -> None:
    """With this machine's facts, whose lists of CPU features are the longest of all."""
    facts = {**read_fingerprint().fields(), "weights": "1" * 64, "variant": "english", "regions": "2" * 64}
    names = ("bytecode", "numba", "signal", "conditionals", "aot")
    software = {name: value for name, value in facts.items() if name not in {"cpu_features", "instruction_set"}}
    families = [
        replace(make_family(name), requires=software if name != "aot" else {**software, **facts}) for name in names
    ]
    labels = labels_of([make_manifest(families)])
    assert len(labels[STATES]) < 8000


def make_family(name: str) -> Any:
    from chatterbox_prewarm.state.manifest import FamilyEntry

    return FamilyEntry(name=name, requires={}, files=(), seconds_spent=0.0, seconds_saved=0.0)


def test_an_image_cannot_hold_two_states_of_one_key_or_none(three: list[Manifest]) -> None:
    with pytest.raises(BadInputError, match="two of the states"):
        labels_of([three[0], replace(three[0], created="2030-01-01T00:00:00+00:00")])
    with pytest.raises(BadInputError, match="without a warm state"):
        labels_of([])


def test_an_image_without_the_label_is_refused_with_a_next_step() -> None:
    with pytest.raises(EngineError, match=r"has no label io\.chatterbox-prewarm\.states") as caught:
        read_states({"io.chatterbox-prewarm.schema": str(SCHEMA_VERSION)})
    assert caught.value.exit_code == 14


def edited(three: list[Manifest], change: Callable[[dict[str, Any]], object]) -> dict[str, str]:
    labels = labels_of(three)
    raw = json.loads(labels[STATES])
    change(raw)
    return {**labels, STATES: json.dumps(raw)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(schema=2, states="anything"), "is of schema 2; this version reads up to 1"),
        (lambda raw: raw.update(schema="1"), "malformed"),
        (lambda raw: raw.update(schema=True), "malformed"),
        (lambda raw: raw.pop("schema"), "malformed"),
        (lambda raw: raw.update(states=[]), "of no state"),
        (lambda raw: raw["states"].append(raw["states"][0]), "one twice"),
        (lambda raw: raw["states"].append("x"), "malformed"),
        (lambda raw: raw["states"][0].update(key=1), "1 is no text"),
        (lambda raw: raw["states"][0].pop("device"), "device"),
        (lambda raw: raw["states"][0].update(set_digest="x"), "no set digest"),
        (lambda raw: raw["states"][0].update(families=[]), "malformed"),
        (lambda raw: raw["states"][0]["families"]["numba"].update(bytes=-1), "the bytes of numba are -1"),
        (lambda raw: raw["states"][0]["families"]["numba"].update(bytes=True), "the bytes of numba are True"),
        (lambda raw: raw["states"][0]["families"]["numba"].update(requires={"arch": None}), "None is no text"),
        (lambda raw: raw["states"][0].update(measured=[]), "malformed"),
        (lambda raw: raw["states"][0]["measured"].update(resident_bytes=True), "resident_bytes is True"),
        (lambda raw: raw["states"][0]["measured"].update(cold_seconds=-1), "cold_seconds is -1"),
        (lambda raw: raw["states"][0]["measured"].update(cold_seconds=float("inf")), "cold_seconds is inf"),
        (lambda raw: raw["states"][0]["measured"].update(device_bytes=10**30), "device_bytes is 1000"),
    ],
)
def test_a_label_that_is_malformed_or_newer_is_refused(
    three: list[Manifest], change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(EngineError, match=says):
        read_states(edited(three, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, '"x"', "null"])
def test_a_label_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="malformed"):
        read_states({STATES: text})
