"""Family `signal`: resampler configurations with their kernels, mel filter banks and windows.

These constants are small and cheap, and are needed when a voice is added at run time. Upstream keeps them in two
`lru_cache`s and in two module dictionaries. This family replaces both `lru_cache`s and the dictionary of mel filters
with tables that it can fill and that count look-ups: a baked constant is a hit, a computed one is a miss.
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import BAKE_AGAIN, Family, tensor_bytes
from chatterbox_prewarm.system.regular_files import read_regular

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from chatterbox_prewarm.families.base import FamilyContext
    from chatterbox_prewarm.system.metrics import StartMetrics

_FILE = "constants.safetensors"
_RESAMPLERS = "resamplers.json"


class SignalFamily(Family):
    """See the module's docstring."""

    name = "signal"
    for_upstream = True
    timers = ("signal",)

    def __init__(self) -> None:
        self._resamplers = CountingTable()
        self._voice_mel = CountingTable()

    def attach(self, directory: Path | None, context: FamilyContext) -> None:
        """Fill upstream's caches with tensors on the model's device."""
        self.replace_caches()
        if directory is not None:
            with context.metrics.phase("signal"):
                self._fill(directory, context)
        for table in (self._resamplers, self._voice_mel, _mel_module().mel_basis):
            table.metrics = context.metrics

    def _fill(self, directory: Path, context: FamilyContext) -> None:
        from safetensors.torch import load_file

        device = device_key(context.device)
        tensors = load_file(directory / _FILE)
        for key, config in json.loads(read_regular(directory / _RESAMPLERS)).items():
            source, target = config["orig_freq"], config["new_freq"]
            self._resamplers[source, target, device] = _resampler(config, tensors[f"resampler.{key}"]).to(device)
        mel = _mel_module()
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "mel":
                mel.mel_basis[f"{rest}_{device}"] = tensor.to(device)
            elif kind == "window":
                mel.hann_window[device] = tensor.to(device)
            elif kind == "voice_mel":
                self._voice_mel["basis"] = tensor.numpy()
        context.metrics.loaded["signal"] += len(tensors)

    def save(self, directory: Path, context: FamilyContext) -> tuple[str, ...]:  # noqa: ARG002
        """Write the constants that the warm-up's reference clips needed."""
        tensors: dict[str, torch.Tensor] = {}
        configs: dict[str, dict[str, int]] = {}
        for (source, target, _), resampler in self._resamplers.items():
            key = f"{source}_{target}"
            configs[key] = {"orig_freq": source, "new_freq": target, "gcd": resampler.gcd, "width": resampler.width}
            tensors[f"resampler.{key}"] = resampler.kernel
        mel = _mel_module()
        for key, basis in mel.mel_basis.items():
            tensors[f"mel.{key.rpartition('_')[0]}"] = basis  # without the device
        for window in mel.hann_window.values():
            tensors["window.hann"] = window
        for basis in self._voice_mel.values():
            tensors["voice_mel.basis"] = importlib.import_module("torch").from_numpy(basis)
        (directory / _FILE).write_bytes(tensor_bytes(tensors))
        (directory / _RESAMPLERS).write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return ("chatterbox", "torchaudio", "librosa")

    def replace_caches(self) -> None:
        """Replace upstream's mel dictionary and its two `lru_cache`s with tables that count look-ups."""
        s3gen: Any = importlib.import_module("chatterbox.models.s3gen.s3gen")
        melspec: Any = importlib.import_module("chatterbox.models.voice_encoder.melspec")
        compute_resampler = getattr(s3gen.get_resampler, "__wrapped__", None)
        compute_mel = getattr(melspec.mel_basis, "__wrapped__", None)
        if compute_resampler is None or compute_mel is None:
            return  # this process replaced them earlier

        def get_resampler(source: int, target: int, device: Any) -> Any:
            key = (source, target, device_key(device))
            if key not in self._resamplers:
                self._resamplers[key] = compute_resampler(source, target, device)
            return self._resamplers[key]

        def mel_basis(hp: Any) -> Any:
            if "basis" not in self._voice_mel:
                self._voice_mel["basis"] = compute_mel(hp)
            return self._voice_mel["basis"]

        s3gen.get_resampler = get_resampler
        melspec.mel_basis = mel_basis
        mel = _mel_module()
        mel.mel_basis = CountingTable(mel.mel_basis)


class CountingTable(dict[Any, Any]):
    """A dictionary that counts its membership tests once `metrics` is set.

    A key that exists is a hit. A missing key is a miss: the caller then computes it, and it is not counted again.
    """

    metrics: StartMetrics | None = None

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self._computed: set[object] = set()

    def __contains__(self, key: object) -> bool:
        exists = super().__contains__(key)
        if self.metrics is not None and key not in self._computed:
            if exists:
                self.metrics.hit("signal")
            else:
                self._computed.add(key)
                self.metrics.miss("signal", f"computed {key!r}", next_step=BAKE_AGAIN)
        return exists


def device_key(device: Any) -> str:
    """Return the name that a tensor on this device reports: "cuda:0" for "cuda". Upstream uses it in its keys."""
    import torch

    return str(torch.empty(0, device=device).device)


def _mel_module() -> Any:
    return importlib.import_module("chatterbox.models.s3gen.utils.mel")


def _resampler(config: dict[str, int], kernel: torch.Tensor) -> Any:
    """Build a torchaudio `Resample` around an existing kernel."""
    import torchaudio

    resampler = torchaudio.transforms.Resample(1, 1)  # for equal rates it computes no kernel
    resampler.orig_freq, resampler.new_freq = config["orig_freq"], config["new_freq"]
    resampler.gcd, resampler.width = config["gcd"], config["width"]
    resampler.register_buffer("kernel", kernel)
    return resampler
