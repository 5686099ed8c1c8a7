"""Labels of an image: their values, the round trip through JSON, and their size."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.errors import BadInputError, EngineError
from chatterbox_prewarm.image.labels import STATES, image_labels, read_states, state_label
from chatterbox_prewarm.state.manifest import SCHEMA_VERSION, Measurements
from chatterbox_prewarm.state.state import state_key
from chatterbox_prewarm.system.fingerprint import read_fingerprint
from chatterbox_prewarm.version import __version__
from tests.helpers.states import MEASURED, make_manifest, make_state_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.state.manifest import Manifest

H100 = {"arch": "x86_64", "gpu": "NVIDIA H100", "compute_capability": "9.0", "driver": "550.54.15"}
L4 = {"arch": "x86_64", "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "550.54.15"}
#: The documented labels of a state's properties.
NAMES = {
    f"io.chatterbox-prewarm.{name}"
    for name in ("schema", "variant", "profile", "gpu", "compute-capability", "driver", "torch", "set-digest")
}


@pytest.fixture
def manifests(tmp_path: Path) -> list[Manifest]:
    """Manifests of states for an H100, an L4, and a CPU."""
    return [
        make_state_for(tmp_path / "h100", H100, code=b"1"),
        make_state_for(tmp_path / "l4", L4, code=b"22"),
        make_state_for(tmp_path / "cpu", {"arch": "x86_64"}, device="cpu", profile="eager"),
    ]


def test_a_label_says_whether_a_state_was_compiled_without_the_gpu(manifests: list[Manifest]) -> None:
    labels = image_labels([replace(manifests[0], cross_compiled=True), manifests[1]])
    assert {state.gpu: state.cross_compiled for state in read_states(labels)} == {H100["gpu"]: True, L4["gpu"]: False}
    assert labels[STATES].count("cross_compiled") == 1, "labels of other states stay as they were"


def test_each_property_of_a_state_has_a_label(manifests: list[Manifest]) -> None:
    labels = image_labels(manifests[:1], base_name="registry.example.com/speech:1", base_digest="sha256:" + "a" * 64)
    assert labels.pop(STATES)
    assert labels == {
        "io.chatterbox-prewarm.schema": str(SCHEMA_VERSION),
        "io.chatterbox-prewarm.variant": "english",
        "io.chatterbox-prewarm.profile": "aot",
        "io.chatterbox-prewarm.gpu": "NVIDIA H100",
        "io.chatterbox-prewarm.compute-capability": "9.0",
        "io.chatterbox-prewarm.driver": "550.54.15",
        "io.chatterbox-prewarm.torch": "2.6.0",
        "io.chatterbox-prewarm.set-digest": manifests[0].set_digest,
        "org.opencontainers.image.title": "chatterbox-prewarm",
        "org.opencontainers.image.description": "Chatterbox TTS with its warm state baked in",
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.licenses": "MIT",
        "org.opencontainers.image.created": "2025-01-02T03:04:05+00:00",
        "org.opencontainers.image.base.name": "registry.example.com/speech:1",
        "org.opencontainers.image.base.digest": "sha256:" + "a" * 64,
    }


def test_values_of_several_states_are_joined_once_each_in_the_order_of_the_keys(manifests: list[Manifest]) -> None:
    labels = image_labels(manifests)
    assert labels.keys() >= NAMES
    values = {name.rpartition(".")[2]: labels[name] for name in NAMES}
    assert values["gpu"] == "none, NVIDIA H100, NVIDIA L4"
    assert values["compute-capability"] == "none, 9.0, 8.9"
    assert values["driver"] == "none, 550.54.15"
    assert values["profile"] == "eager, aot"
    assert values["set-digest"] == ", ".join(manifests[index].set_digest for index in (2, 0, 1))
    assert image_labels(manifests[::-1]) == labels


def test_labels_round_trip(manifests: list[Manifest]) -> None:
    states = read_states(image_labels(manifests))
    assert [state.key for state in states] == sorted(map(state_key, manifests))
    by_key = {state.key: state for state in states}
    for manifest in manifests:
        state = by_key[state_key(manifest)]
        assert (state.set_digest, state.variant) == (manifest.set_digest, manifest.variant)
        assert (state.profile, state.device) == (manifest.execution.profile, manifest.reference.device)
        assert {family.name: (family.size, dict(family.requires)) for family in state.families} == {
            family.name: (family.size, family.requires) for family in manifest.families
        }


def test_the_inputs_digest_covers_weights_and_parameters_but_not_the_files(manifests: list[Manifest]) -> None:
    digest = state_label(manifests[0]).inputs_digest
    rebaked = replace(manifests[0], set_digest="9" * 64, created="2030-01-01T00:00:00+00:00")
    assert state_label(rebaked).inputs_digest == digest
    other_weights = replace(manifests[0], weights=replace(manifests[0].weights, set_digest="9" * 64))
    assert state_label(other_weights).inputs_digest != digest
    provenance = manifests[0].provenance
    with_voice = replace(provenance, parameters={**provenance.parameters, "voice:fox": "sha256:1"})
    assert state_label(replace(manifests[0], provenance=with_voice)).inputs_digest != digest
    labels = image_labels(manifests[:1])
    (state,) = read_states(labels)
    assert state.inputs_digest == digest
    older = json.loads(labels[STATES])
    del older["states"][0]["made_of"]
    assert read_states({STATES: json.dumps(older)}) == (replace(state, inputs_digest=""),)


def test_measurements_round_trip_and_unknown_ones_are_ignored(manifests: list[Manifest]) -> None:
    labels = image_labels(manifests[:1])
    (state,) = read_states(labels)
    assert state.measured == manifests[0].measured == MEASURED
    raw = json.loads(labels[STATES])
    raw["states"][0]["measured"]["watts"] = "many"
    assert read_states({STATES: json.dumps(raw)}) == (state,)
    del raw["states"][0]["measured"]
    assert read_states({STATES: json.dumps(raw)}) == (replace(state, measured=Measurements()),)


def test_facts_of_source_files_are_left_out_because_the_image_contains_the_files(manifests: list[Manifest]) -> None:
    numba = replace(manifests[0].families[0], requires={"arch": "x86_64", "source:/x.py": "6 bytes"})
    (state,) = read_states(image_labels([replace(manifests[0], families=(numba,))]))
    assert state.families[0].requires == {"arch": "x86_64"}


def test_the_label_of_a_state_that_depends_on_every_fact_is_below_8000_characters() -> None:
    """Uses the facts of this machine, because its lists of CPU features are the longest values."""
    facts = {**read_fingerprint().fields(), "weights": "1" * 64, "variant": "english", "regions": "2" * 64}
    names = ("bytecode", "numba", "signal", "conditionals", "aot")
    software = {name: value for name, value in facts.items() if name not in {"cpu_features", "instruction_set"}}
    families = [
        replace(make_family(name), requires=software if name != "aot" else {**software, **facts}) for name in names
    ]
    labels = image_labels([make_manifest(families)])
    assert len(labels[STATES]) < 8000


def make_family(name: str) -> Any:
    from chatterbox_prewarm.state.manifest import FamilyEntry

    return FamilyEntry(name=name, requires={}, files=(), seconds_spent=0.0, seconds_saved=0.0)


def test_two_states_with_one_key_and_an_image_without_states_are_refused(manifests: list[Manifest]) -> None:
    with pytest.raises(BadInputError, match="two of the states"):
        image_labels([manifests[0], replace(manifests[0], created="2030-01-01T00:00:00+00:00")])
    with pytest.raises(BadInputError, match="without a warm state"):
        image_labels([])


def test_an_image_without_the_label_is_refused_with_a_next_step() -> None:
    with pytest.raises(EngineError, match=r"has no label io\.chatterbox-prewarm\.states") as caught:
        read_states({"io.chatterbox-prewarm.schema": str(SCHEMA_VERSION)})
    assert caught.value.exit_code == 14


def edited_labels(manifests: list[Manifest], change: Callable[[dict[str, Any]], object]) -> dict[str, str]:
    labels = image_labels(manifests)
    raw = json.loads(labels[STATES])
    change(raw)
    return {**labels, STATES: json.dumps(raw)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema=2, states="anything"), "has schema 2, but this version reads schemas up to 1"),
        (lambda raw: raw.update(schema="1"), "malformed"),
        (lambda raw: raw.update(schema=True), "malformed"),
        (lambda raw: raw.pop("schema"), "malformed"),
        (lambda raw: raw.update(states=[]), "describes no state"),
        (lambda raw: raw["states"].append(raw["states"][0]), "the same state twice"),
        (lambda raw: raw["states"].append("x"), "malformed"),
        (lambda raw: raw["states"][0].update(key=1), "1 is not text"),
        (lambda raw: raw["states"][0].pop("device"), "device"),
        (lambda raw: raw["states"][0].update(set_digest="x"), "not a set digest"),
        (lambda raw: raw["states"][0].update(families=[]), "malformed"),
        (lambda raw: raw["states"][0]["families"]["numba"].update(bytes=-1), "the size of numba is -1 bytes"),
        (lambda raw: raw["states"][0]["families"]["numba"].update(bytes=True), "the size of numba is True bytes"),
        (lambda raw: raw["states"][0]["families"]["numba"].update(requires={"arch": None}), "None is not text"),
        (lambda raw: raw["states"][0].update(measured=[]), "malformed"),
        (lambda raw: raw["states"][0]["measured"].update(resident_bytes=True), "resident_bytes is True"),
        (lambda raw: raw["states"][0]["measured"].update(cold_seconds=-1), "cold_seconds is -1"),
        (lambda raw: raw["states"][0]["measured"].update(cold_seconds=float("inf")), "cold_seconds is inf"),
        (lambda raw: raw["states"][0]["measured"].update(device_bytes=10**30), "device_bytes is 1000"),
    ],
)
def test_a_malformed_or_newer_label_is_refused(
    manifests: list[Manifest], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        read_states(edited_labels(manifests, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000, '"x"', "null"])
def test_a_label_that_is_not_a_json_object_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match="malformed"):
        read_states({STATES: text})
