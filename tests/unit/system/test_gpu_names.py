"""A GPU has the name that NVML reports. A short name of one product is accepted, others are refused."""

from __future__ import annotations

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.system.gpu_names import nvml_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("L4", "NVIDIA L4"),
        ("l40s", "NVIDIA L40S"),
        ("nvidia-l4", "NVIDIA L4"),
        ("T4", "Tesla T4"),
        ("nvidia-tesla-t4", "Tesla T4"),
        ("H200", "NVIDIA H200"),
        ("H100 PCIe", "NVIDIA H100 PCIe"),
        ("H100-80GB", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA-A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"),
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("A6000", "NVIDIA RTX A6000"),
    ],
)
def test_a_short_name_of_one_product_is_accepted(text: str, name: str) -> None:
    assert nvml_name(text) == name
    assert nvml_name(name) == name


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA B300 SXM6 AC", "Quadro RTX 6000"])
def test_a_product_that_this_version_does_not_know_is_accepted(name: str) -> None:
    assert nvml_name(name) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H100", "several GPUs: NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe, NVIDIA H100 NVL"),
        ("NVIDIA H100", "several GPUs: NVIDIA H100 80GB HBM3"),
        ("L4S", "not the name of a GPU, perhaps NVIDIA L40S or NVIDIA L4"),
        ("B2", "not the name of a GPU, perhaps NVIDIA B200"),
        ("", "not the name of a GPU"),
        ("NVIDIA", "not the name of a GPU"),
    ],
)
def test_another_name_is_refused_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        nvml_name(text)
