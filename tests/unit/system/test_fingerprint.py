"""Test that fingerprints are read without torch, and that every difference is explained."""

from __future__ import annotations

import importlib
import platform
import sys
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.system import fingerprint
from chatterbox_prewarm.system.fingerprint import ABSENT, Fingerprint, explain, package_digest, read_fingerprint
from tests.helpers.children import call

if TYPE_CHECKING:
    from pathlib import Path

FIELDS = list(Fingerprint.__dataclass_fields__)


def test_reading_the_fingerprint_imports_no_heavy_package() -> None:
    report = call("fingerprint")
    assert report["heavy"] == []
    fields = report["fields"]
    assert set(fields) == set(FIELDS)
    assert fields["arch"] == platform.machine()
    assert platform.python_version() in fields["python"]
    assert fields["cpu_features"].split() == sorted(fields["cpu_features"].split())
    assert all(isinstance(value, str) for value in fields.values())


def test_two_readings_are_equal() -> None:
    assert call("fingerprint")["fields"] == call("fingerprint")["fields"]


class ManyGpus:
    """Answer like NVML on a machine with three GPUs of two models, because the machine of this test may have no GPU."""

    NVMLError = RuntimeError
    _GPUS = ("GPU-a1", "NVIDIA L4", 8, 9), ("GPU-b1", "NVIDIA L4", 8, 9), ("GPU-c1", "NVIDIA H200", 9, 0)

    def __getattr__(self, name: str) -> Any:
        return {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 3,
            "nvmlSystemGetDriverVersion": lambda: "570.1",
            "nvmlDeviceGetHandleByIndex": self._GPUS.__getitem__,
            "nvmlDeviceGetHandleByUUID": {"MIG-d": ("MIG-d", "NVIDIA H200 MIG 1g.18gb", 9, 0)}.__getitem__,
            "nvmlDeviceGetUUID": lambda gpu: gpu[0],
            "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu[2:],
            "nvmlDeviceGetName": lambda gpu: gpu[1],
        }[name]


@pytest.mark.parametrize(
    ("visible", "device", "gpu", "capability"),
    [
        (None, "cuda", "NVIDIA L4", "8.9"),
        (None, "cuda:2", "NVIDIA H200", "9.0"),
        (None, "cuda:3", ABSENT, ABSENT),
        ("", "cuda", ABSENT, ABSENT),
        ("7", "cuda", ABSENT, ABSENT),
        ("2,0", "cuda", "NVIDIA H200", "9.0"),
        ("2,0", "cuda:1", "NVIDIA L4", "8.9"),
        ("GPU-c", "cuda:0", "NVIDIA H200", "9.0"),
        ("GPU-b1,MIG-d", "cuda:1", "NVIDIA H200 MIG 1g.18gb", "9.0"),
        ("2", "cpu", "NVIDIA H200", "9.0"),
        ("2", "cuda:nonsense", "NVIDIA H200", "9.0"),
    ],
)
def test_the_gpu_is_the_one_that_torch_selects(
    visible: str | None, device: str, gpu: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ManyGpus())
    monkeypatch.setattr(fingerprint, "has_nvml", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = read_fingerprint(device)
    assert (found.gpu, found.compute_capability, found.driver) == (gpu, capability, "570.1")


def test_nvml_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inits = []

    class Nvml(ManyGpus):
        def __getattr__(self, name: str) -> Any:
            return (lambda: inits.append(name)) if name == "nvmlInit" else super().__getattr__(name)

    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    fingerprint.has_nvml.cache_clear()
    try:
        assert fingerprint.visible_gpus() == 3
        assert read_fingerprint().driver == "570.1"
    finally:
        fingerprint.has_nvml.cache_clear()
    assert inits == ["nvmlInit"]


@pytest.mark.parametrize(
    ("field", "description"),
    [
        ("arch", "processor architecture"),
        ("cpu_model", "CPU model"),
        ("cpu_features", "CPU features"),
        ("instruction_set", "CPU instruction set"),
        ("regions", "source of the regions"),
        ("cache", "cache path"),
        ("device", "device"),
        ("gpu", "GPU"),
        ("compute_capability", "GPU compute capability"),
        ("driver", "GPU driver"),
        ("python", "Python"),
        ("site_packages", "path of the Python packages"),
        ("torch", "torch"),
        ("torchaudio", "torchaudio"),
        ("transformers", "transformers"),
        ("numba", "numba"),
        ("llvmlite", "llvmlite"),
        ("librosa", "librosa"),
        ("chatterbox", "chatterbox source"),
        ("weights", "weights"),
        ("variant", "model variant"),
        ("source:/lib/filters.py", "source file /lib/filters.py"),
    ],
)
def test_a_difference_is_a_sentence_with_the_field_and_both_values(field: str, description: str) -> None:
    recorded, current = {"same": "x", field: "before"}, {"same": "x", field: "after", "other": "y"}
    assert explain(recorded, current) == [f"{description}: baked with before, here after"]


def test_every_field_has_a_description_or_is_the_name_of_a_package() -> None:
    descriptions = {explain({name: "a"}, {})[0].partition(":")[0] for name in FIELDS}
    assert len(descriptions) == len(FIELDS)
    assert not any("_" in description for description in descriptions)


def test_a_missing_fact_counts_as_absent() -> None:
    assert explain({"gpu": "NVIDIA H200"}, {}) == [f"GPU: baked with NVIDIA H200, here {ABSENT}"]
    assert explain({"gpu": ABSENT}, {}) == []


def test_a_long_value_is_shortened_but_compared_in_full() -> None:
    flags = "avx " * 100
    (sentence,) = explain({"cpu_features": flags + "a"}, {"cpu_features": flags + "b"})
    assert sentence.count("...") == 2
    assert len(sentence) < 260


def test_the_digest_of_a_package_depends_only_on_its_python_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "probe_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "inner" / "deep.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def digest() -> str:
        package_digest.cache_clear()
        importlib.invalidate_caches()
        return package_digest("probe_package")

    first = digest()
    assert len(first) == 64
    (package / "notes.txt").write_text("not Python")
    assert digest() == first
    (package / "inner" / "deep.py").write_text("x = 2\n")
    second = digest()
    (package / "inner" / "deep.py").rename(package / "inner" / "other.py")
    third = digest()
    assert len({first, second, third}) == 3
    assert "probe_package" not in sys.modules


def test_a_package_that_is_not_installed_is_absent() -> None:
    assert package_digest("no_such_package_anywhere") == ABSENT
    assert package_digest("colorsys") == ABSENT  # a module is not a package
