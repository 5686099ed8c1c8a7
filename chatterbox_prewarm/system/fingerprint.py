"""The fingerprint: the properties of the machine and its software that decide whether cached state can be reused.

Reading it does not import torch, because `prepare` compares fingerprints before it imports any heavy package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import os
import platform
import re
import sys
import sysconfig
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

ABSENT = "absent"

#: The fields that describe the machine. All others describe the software, which is part of the image.
MACHINE = ("arch", "cpu_model", "cpu_features", "instruction_set", "gpu", "compute_capability", "driver")

#: The fields that describe packages which only upstream's model imports. A lean installation does not have them.
UPSTREAM = ("torchaudio", "transformers", "numba", "llvmlite", "librosa", "chatterbox")

#: CPU flags that `-march=native` turns into instructions. Other flags change with the kernel and its settings.
_INSTRUCTION_FLAG = re.compile(
    r"sse\d?|sse4_[12]|ssse3|avx|avx2|avx_\w+|avx512\w*|avx10\w*|amx_\w+|fma|f16c|bmi[12]|abm|popcnt|movbe|adx|gfni|vaes"
    r"|aes|vpclmulqdq|pclmulqdq|sha_ni|asimd\w*|sve\w*|sme\w*|bf16|i8mm|fphp"
)

#: Values up to this many characters are shown in full.
_MAX_SHOWN = 96

#: Descriptions of the fields, for explanations.
_DESCRIPTIONS = {
    "arch": "processor architecture",
    "cpu_model": "CPU model",
    "cpu_features": "CPU features",
    "instruction_set": "CPU instruction set",
    "gpu": "GPU",
    "compute_capability": "GPU compute capability",
    "driver": "GPU driver",
    "python": "Python",
    "site_packages": "path of the Python packages",
    "chatterbox": "chatterbox source",
    "weights": "weights",
    "variant": "model variant",
    "regions": "source of the regions",
    "cache": "cache path",
    "device": "device",
}


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """A machine and its software.

    Attributes:
        cpu_features: the CPU flags that the kernel reports, sorted and joined by spaces.
        instruction_set: those of the flags for which a compiler makes code.
        chatterbox: SHA-256 over the sources of the installed package. Its version is not enough: upstream's main branch
            and its release have the same one. The other package fields are versions.
    """

    arch: str
    cpu_model: str
    cpu_features: str
    instruction_set: str
    gpu: str
    compute_capability: str
    driver: str
    python: str
    site_packages: str
    torch: str
    torchaudio: str
    triton: str
    transformers: str
    numba: str
    llvmlite: str
    librosa: str
    chatterbox: str

    def fields(self) -> dict[str, str]:
        """Return the fingerprint as a mapping of field to value."""
        return asdict(self)


def read_fingerprint(device: str = "cpu") -> Fingerprint:
    """Read the fingerprint of this machine and of the packages that this interpreter would import.

    Args:
        device: a torch device. Its number selects the GPU to read; without one, and for a CPU, the first GPU is read.
    """
    model, features = _cpu()
    number = device.partition(":")[2]
    gpu, capability, driver = _gpu(int(number) if number.isdecimal() else 0)
    return Fingerprint(
        arch=platform.machine(),
        cpu_model=model,
        cpu_features=features,
        instruction_set=" ".join(flag for flag in features.split() if _INSTRUCTION_FLAG.fullmatch(flag)),
        gpu=gpu,
        compute_capability=capability,
        driver=driver,
        python=f"{sys.implementation.cache_tag} {platform.python_version()}",
        site_packages=sysconfig.get_paths()["purelib"],
        torch=_version("torch"),
        torchaudio=_version("torchaudio"),
        triton=_version("triton"),
        transformers=_version("transformers"),
        numba=_version("numba"),
        llvmlite=_version("llvmlite"),
        librosa=_version("librosa"),
        chatterbox=package_digest("chatterbox"),
    )


def upstream_installed() -> bool:
    """Return whether upstream's model can be imported, which makes voices. A lean installation speaks without it."""
    return importlib.util.find_spec("chatterbox") is not None


def used_facts(required: Mapping[str, str]) -> dict[str, str]:
    """Leave out facts about packages that nothing uses here, because upstream's model is not installed."""
    if upstream_installed():
        return dict(required)
    return {name: value for name, value in required.items() if name not in UPSTREAM}


def device_kind(device: str) -> str:
    """Return the kind of a torch device: "cpu" or "cuda"."""
    return device.partition(":")[0]


def explain(recorded: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Describe each difference between `current` and `recorded` in a sentence, in the order of `recorded`."""
    sentences = []
    for name, value in recorded.items():
        if (here := current.get(name, ABSENT)) != value:
            baked, found = contrast(value, here)
            sentences.append(f"{describe_fact(name)}: baked with {baked}, here {found}")
    return sentences


def describe_fact(name: str) -> str:
    """Return the description of a fact for an explanation."""
    if name.startswith("source:"):
        return f"source file {name.removeprefix('source:')}"
    return _DESCRIPTIONS.get(name, name)


def contrast(one: str, other: str) -> tuple[str, str]:
    """Shorten two different values. Of a long list of words, keep only words that the other list lacks."""
    words, others = one.split(), other.split()
    if max(len(one), len(other)) > _MAX_SHOWN and min(len(words), len(others)) > 1:
        one = " ".join(["...", *(word for word in words if word not in set(others))])
        other = " ".join(["...", *(word for word in others if word not in set(words))])
    return _short(one), _short(other)


def _short(value: str) -> str:
    return value if len(value) <= _MAX_SHOWN else value[: _MAX_SHOWN - 3] + "..."


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ABSENT


@lru_cache(maxsize=8)
def package_digest(package: str) -> str:
    """Return the SHA-256 over the Python sources of a package without importing it; `absent` if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ABSENT
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _cpu() -> tuple[str, str]:
    """Return model name and sorted flags from the kernel. Arm has no model name, and calls the flags `Features`."""
    model, features = ABSENT, ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or ABSENT, features
    for line in text.splitlines():
        key, _, value = line.partition(":")
        match key.strip():
            case "model name":
                model = value.strip()
            case "flags" | "Features":
                features = " ".join(sorted(value.split()))
            case _:
                continue
        if model != ABSENT and features:
            break
    return model, features


def _gpu(number: int) -> tuple[str, str, str]:
    """Return product name, compute capability and driver version of a GPU from NVML; `absent` without a GPU.

    Args:
        number: torch's index among the GPUs that this process may use. CUDA orders different GPUs by speed unless
            CUDA_DEVICE_ORDER is PCI_BUS_ID, which is the only order that NVML has.
    """
    if not has_nvml():
        return ABSENT, ABSENT, ABSENT
    import pynvml

    try:  # a driver that was upgraded on a running system answers only some calls
        handle = _visible_gpu(pynvml, number)
        if handle is None:
            return ABSENT, ABSENT, str(pynvml.nvmlSystemGetDriverVersion())
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return str(pynvml.nvmlDeviceGetName(handle)), f"{major}.{minor}", str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as error:
        logger.warning("NVML: %s; continuing without a GPU", error)
        return ABSENT, ABSENT, ABSENT


@cache
def has_nvml() -> bool:
    """Return whether this machine has NVML, which stays loaded until the process ends."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def visible_gpus() -> int:
    """Count the GPUs that this process may use; 0 if NVML finds no GPU."""
    if not has_nvml():
        return 0
    import pynvml

    try:
        return next(number for number in itertools.count() if _visible_gpu(pynvml, number) is None)
    except pynvml.NVMLError as error:
        logger.warning("NVML: %s; continuing without a GPU", error)
        return 0


def free_gpu_memory(number: int) -> int | None:
    """Return the free bytes of a GPU that CUDA sees, by its number there; None if NVML cannot tell."""
    if not has_nvml():
        return None
    import pynvml

    try:
        handle = _visible_gpu(pynvml, number)
        return None if handle is None else int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
    except pynvml.NVMLError:
        return None


def _visible_gpu(nvml: Any, number: int) -> Any:
    """Return NVML's handle of the GPU with this CUDA index, or None."""
    count = nvml.nvmlDeviceGetCount()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    if number >= len(names) or not names[number]:
        return None
    name = names[number]
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name)) if int(name) < count else None
    # CUDA accepts the beginning of a UUID, NVML only the full UUID.
    for index in range(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if str(nvml.nvmlDeviceGetUUID(handle)).startswith(name):
            return handle
    return nvml.nvmlDeviceGetHandleByUUID(name)  # a MIG instance, which has no index
