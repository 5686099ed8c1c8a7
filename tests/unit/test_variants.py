"""Test that the code outside of the variants works for each variant."""

from __future__ import annotations

import ast
import dataclasses
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL, VARIANTS, Variant, get_variant
from tests.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = ROOT / "chatterbox_prewarm"
#: Where a variant may be named.
ALLOWED = (PACKAGE / "model" / "variants", PACKAGE / "weights" / "variants.py")


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _named(path: Path) -> set[str]:
    return set(VARIANTS) & set(_strings(ast.parse(path.read_text(encoding="utf-8"))))


def test_no_code_outside_of_the_variants_names_one() -> None:
    sources = (*PACKAGE.rglob("*.py"), *(ROOT / "build").glob("*.py"))
    others = [path for path in sources if not any(path.is_relative_to(allowed) for allowed in ALLOWED)]
    assert len(others) > 200
    assert {str(path): named for path in others if (named := _named(path))} == {}
    assert _named(PACKAGE / "weights" / "variants.py") == set(VARIANTS), "the search finds names"


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_each_variant_has_a_module_and_files_that_differ(variant: object) -> None:
    found = get_variant(variant.name)  # type: ignore[attr-defined]
    assert (PACKAGE / "model" / "variants" / f"{found.module}.py").is_file()
    assert len(set(found.files)) == len(found.files)
    assert set(found.published) <= set(found.safetensors)
    assert found.languages.keys() == found.samples.keys()


def test_a_language_is_found_by_its_code_in_any_case_and_the_first_one_is_the_default() -> None:
    assert MULTILINGUAL.check_language("FR") == "fr"
    assert MULTILINGUAL.check_language(None) == ENGLISH.check_language(None) == "en"
    assert len(MULTILINGUAL.languages) == 23


@pytest.mark.parametrize("code", ["xx", "", "zh-CN", "français"])
def test_an_unknown_language_is_refused_with_the_known_ones(code: str) -> None:
    with pytest.raises(BadInputError) as caught:
        MULTILINGUAL.check_language(code)
    assert "zh" in (caught.value.next_step or "")


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInputError) as caught:
        get_variant("../english")
    assert "english, multilingual, multilingual-v3" in (caught.value.next_step or "")


@pytest.mark.parametrize("name", ["flash", "Chatterbox-Flash"])
def test_a_related_model_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(BadInputError, match="has another architecture, which this version does not support"):
        get_variant(name)


def test_the_voice_conversion_is_no_variant_and_the_error_says_how_to_get_it() -> None:
    with pytest.raises(BadInputError, match="has no checkpoint of its own") as caught:
        get_variant("vc")
    assert "add --convert to `serve`" in (caught.value.next_step or "")


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_the_default_of_each_control_is_within_its_bounds(variant: Variant) -> None:
    for control in variant.controls.values():
        assert control.default is None or control.low <= control.default <= control.high
    assert not set(variant.controls) & set(variant.ignored_controls)
    with pytest.raises(BadInputError, match="has no setting 'speed'"):
        variant.check_control("speed")


def test_a_variant_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENGLISH.name = "other"  # type: ignore[misc]
