"""Fingerprints: read without torch, compared field by field, explained to a person."""

from __future__ import annotations

import importlib
import platform
import sys
from typing import TYPE_CHECKING, Any

import pytest

from chatterbox_prewarm.state.compatibility import current_facts
from chatterbox_prewarm.system.fingerprint import ABSENT, Fingerprint, explain, package_digest, read_fingerprint
from tests.helpers.children import call

if TYPE_CHECKING:
    from pathlib import Path

FIELDS = list(Fingerprint.__dataclass_fields__)


def test_reading_this_machine_imports_nothing_heavy() -> None:
    seen = call("fingerprint")
    assert seen["heavy"] == []
    fields = seen["fields"]
    assert set(fields) == set(FIELDS)
    assert fields["arch"] == platform.machine()
    assert platform.python_version() in fields["python"]
    assert fields["cpu_features"].split() == sorted(fields["cpu_features"].split())
    assert all(isinstance(value, str) for value in fields.values())


def test_reading_twice_gives_the_same() -> None:
    assert call("fingerprint")["fields"] == call("fingerprint")["fields"]


class ManyGpus:
    """What NVML would say of a machine with three GPUs, two kinds of them; this machine may have none."""

    NVMLError = RuntimeError
    _GPUS = ("GPU-a1", "NVIDIA L4", 8, 9), ("GPU-b1", "NVIDIA L4", 8, 9), ("GPU-c1", "NVIDIA H200", 9, 0)

    def __getattr__(self, name: str) -> Any:
        return {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
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
def test_the_gpu_is_the_one_that_torch_would_take(
    visible: str | None, device: str, gpu: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", ManyGpus())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = read_fingerprint(device)
    assert (found.gpu, found.compute_capability, found.driver) == (gpu, capability, "570.1")


@pytest.mark.parametrize(
    ("field", "words"),
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
        ("site_packages", "place of the Python packages"),
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
def test_a_difference_is_one_sentence_with_the_field_and_both_values(field: str, words: str) -> None:
    recorded, current = {"same": "x", field: "before"}, {"same": "x", field: "after", "unasked": "y"}
    assert explain(recorded, current) == [f"{words}: baked with before, here after"]


def test_every_field_has_been_given_words_or_is_a_packages_own_name() -> None:
    named = {explain({name: "a"}, {})[0].partition(":")[0] for name in FIELDS}
    assert len(named) == len(FIELDS)
    assert not any("_" in words for words in named)


def test_a_fact_that_is_gone_counts_as_absent() -> None:
    assert explain({"gpu": "NVIDIA H200"}, {}) == [f"GPU: baked with NVIDIA H200, here {ABSENT}"]
    assert explain({"gpu": ABSENT}, {}) == []


def test_a_long_value_is_shortened_but_compared_in_full() -> None:
    flags = "avx " * 100
    (sentence,) = explain({"cpu_features": flags + "a"}, {"cpu_features": flags + "b"})
    assert sentence.count("...") == 2
    assert len(sentence) < 260


def test_a_source_file_is_compared_by_size_and_time(tmp_path: Path) -> None:
    source = tmp_path / "filters.py"
    source.write_text("x = 1\n")
    key = f"source:{source}"
    before = current_facts([key, "arch", "gpu"], {"arch": "x86_64"})
    assert before["arch"] == "x86_64"
    assert before["gpu"] == ABSENT
    assert before[key].startswith("6 bytes, modified at ")
    source.write_text("x = 10\n")
    after = current_facts([key], {})
    assert explain({key: before[key]}, after) == [f"source file {source}: baked with {before[key]}, here {after[key]}"]
    source.unlink()
    assert current_facts([key], {}) == {key: ABSENT}


def test_the_digest_of_a_package_changes_with_any_source_and_with_nothing_else(
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
    (package / "notes.txt").write_text("not a source")
    assert digest() == first
    (package / "inner" / "deep.py").write_text("x = 2\n")
    second = digest()
    (package / "inner" / "deep.py").rename(package / "inner" / "other.py")
    third = digest()
    assert len({first, second, third}) == 3
    assert "probe_package" not in sys.modules


def test_a_package_that_is_not_installed_is_absent() -> None:
    assert package_digest("no_such_package_anywhere") == ABSENT
    assert package_digest("colorsys") == ABSENT  # a single module is no package
