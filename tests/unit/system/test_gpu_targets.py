"""Test the table of GPUs that a bake can compile for without having them."""

from __future__ import annotations

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.gpu_names import nvml_name
from chatterbox_prewarm.system.gpu_targets import (
    _ARCHITECTURES,
    _PRODUCTS,
    architecture,
    check_target,
    check_targets,
    find_target,
)


@pytest.mark.parametrize(
    ("text", "gpu", "capability", "multiprocessors"),
    [
        ("NVIDIA H200", "NVIDIA H200", (9, 0), 132),
        ("h200", "NVIDIA H200", (9, 0), 132),
        ("L4", "NVIDIA L4", (8, 9), 58),
        ("T4", "Tesla T4", (7, 5), 40),
        ("RTX 5090", "NVIDIA GeForce RTX 5090", (12, 0), 170),
        ("sm_89", "", (8, 9), 58),
        ("SM_90", "", (9, 0), 132),
    ],
)
def test_a_target_is_a_product_or_an_architecture(
    text: str, gpu: str, capability: tuple[int, int], multiprocessors: int
) -> None:
    target = find_target(text)
    assert (target.gpu, target.capability, target.multiprocessors) == (gpu, capability, multiprocessors)
    assert find_target(target.name) == target


def test_every_product_has_its_name_of_nvml_and_a_known_architecture() -> None:
    assert {nvml_name(name) for name, *_ in _PRODUCTS} == {name for name, *_ in _PRODUCTS}
    assert {capability for _, capability, *_ in _PRODUCTS} == set(_ARCHITECTURES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("H2000", "perhaps NVIDIA H200"),
        ("sm_10", "sm_75, sm_80"),
        ("NVIDIA L40", "NVIDIA L40S"),
        ("A100", "several GPUs"),
        ("", "not the name of a GPU"),
    ],
)
def test_an_unknown_target_is_refused_with_the_nearest_ones(text: str, words: str) -> None:
    with pytest.raises(BadInputError) as caught:
        find_target(text)
    assert words.lower() in f"{caught.value.message} {caught.value.next_step}".lower()


def test_the_same_target_twice_is_refused_under_each_of_its_names() -> None:
    targets = check_targets(["L4", "sm_89"], "cuda", "aot", "bfloat16")
    assert [target.name for target in targets] == ["NVIDIA L4", "sm_89"]
    with pytest.raises(BadInputError, match="NVIDIA L4 is given twice"):
        check_targets(["L4", "H200", "nvidia-l4"], "cuda", "aot", "float32")


def test_bfloat16_is_refused_for_a_gpu_without_its_instructions() -> None:
    check_target("T4", "cuda", "aot", "float32")
    with pytest.raises(BadInputError, match="Tesla T4 cannot compute in bfloat16, which needs sm_80 or newer"):
        check_target("T4", "cuda", "aot", "bfloat16")


def test_the_name_of_an_architecture_is_that_of_the_compilers() -> None:
    assert architecture((10, 0)) == "sm_100"
