"""Family `signal`: resampler configurations with their kernels, mel filter banks and windows.

Small and cheap; they are used when a voice is added at run time. Upstream keeps them in an `lru_cache`, in two module
dictionaries and in another `lru_cache`; each is replaced by a table that can be filled from outside and that counts: a
look-up that finds what was baked is a hit, anything computed is a miss.
"""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.families.base import Family
from chatterbox_prewarm.families.tensors import write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from chatterbox_prewarm.families.base import Session
    from chatterbox_prewarm.system.metrics import WarmupMetrics

_FILE = "constants.safetensors"
_RESAMPLERS = "resamplers.json"


class SignalFamily(Family):
    """See the module's docstring."""

    name = "signal"
    timers = ("signal",)

    def __init__(self) -> None:
        self._resamplers = CountingTable()
        self._voice_mel = CountingTable()

    def applies(self, profile: str, device: str) -> bool:  # noqa: ARG002
        """To all."""
        return True

    def environment(self, cache: Path) -> dict[str, str]:  # noqa: ARG002
        """Nothing to set."""
        return {}

    def prepare(self, directory: Path | None, cache: Path, metrics: WarmupMetrics) -> None:
        """Nothing to do: constants are tensors."""

    def watch(self, metrics: WarmupMetrics) -> None:
        """Nothing to do: the tables count once they are in place."""

    def attach(self, directory: Path | None, session: Session) -> None:
        """Fill upstream's caches on the model's device."""
        self.replace_caches()
        if directory is not None:
            with session.metrics.phase("signal"):
                self._fill(directory, session)
        for table in (self._resamplers, self._voice_mel, _mel_module().mel_basis):
            table.metrics = session.metrics

    def _fill(self, directory: Path, session: Session) -> None:
        from safetensors.torch import load_file

        device = device_key(session.synthesizer.model.device)
        tensors = load_file(directory / _FILE)
        for key, config in json.loads((directory / _RESAMPLERS).read_text(encoding="utf-8")).items():
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
        session.metrics.loaded["signal"] += len(tensors)

    def save(self, directory: Path, session: Session) -> tuple[str, ...]:
        """Write what the warm-up's reference clips have filled."""
        device = device_key(session.synthesizer.model.device)
        tensors: dict[str, torch.Tensor] = {}
        configs: dict[str, dict[str, int]] = {}
        for (source, target, _), resampler in self._resamplers.items():
            key = f"{source}_{target}"
            configs[key] = {"orig_freq": source, "new_freq": target, "gcd": resampler.gcd, "width": resampler.width}
            tensors[f"resampler.{key}"] = resampler.kernel
        mel = _mel_module()
        for key, basis in mel.mel_basis.items():
            tensors[f"mel.{key.removesuffix(f'_{device}')}"] = basis
        for window in mel.hann_window.values():
            tensors["window.hann"] = window
        for basis in self._voice_mel.values():
            tensors["voice_mel.basis"] = importlib.import_module("torch").from_numpy(basis)
        write_tensors(tensors, directory / _FILE)
        (directory / _RESAMPLERS).write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return ("chatterbox", "torchaudio", "librosa")

    def replace_caches(self) -> None:
        """Put tables that count in the place of upstream's dictionary and of its two `lru_cache`s."""
        s3gen: Any = importlib.import_module("chatterbox.models.s3gen.s3gen")
        melspec: Any = importlib.import_module("chatterbox.models.voice_encoder.melspec")
        make_resampler = getattr(s3gen.get_resampler, "__wrapped__", None)
        make_mel = getattr(melspec.mel_basis, "__wrapped__", None)
        if make_resampler is None or make_mel is None:
            return  # replaced before

        def get_resampler(source: int, target: int, device: Any) -> Any:
            key = (source, target, device_key(device))
            if key not in self._resamplers:
                self._resamplers[key] = make_resampler(source, target, device)
            return self._resamplers[key]

        def mel_basis(hp: Any) -> Any:
            if "basis" not in self._voice_mel:
                self._voice_mel["basis"] = make_mel(hp)
            return self._voice_mel["basis"]

        s3gen.get_resampler = get_resampler
        melspec.mel_basis = mel_basis
        mel = _mel_module()
        mel.mel_basis = CountingTable(mel.mel_basis)


class CountingTable(dict[Any, Any]):
    """A dictionary that counts its membership tests once `metrics` is set.

    Found is a hit and not found a miss, whose entry is then computed and from then on counted as neither.
    """

    metrics: WarmupMetrics | None = None

    def __init__(self, *entries: Any) -> None:
        super().__init__(*entries)
        self._computed: set[object] = set()

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        if self.metrics is not None and key not in self._computed:
            if found:
                self.metrics.hit("signal")
            else:
                self._computed.add(key)
                self.metrics.miss("signal", f"computed {key!r}")
        return found


def device_key(device: Any) -> str:
    """A device as a tensor on it names it, which is what upstream's tables are keyed by: "cuda" is "cuda:0"."""
    import torch

    return str(torch.empty(0, device=device).device)


def _mel_module() -> Any:
    return importlib.import_module("chatterbox.models.s3gen.utils.mel")


def _resampler(config: dict[str, int], kernel: torch.Tensor) -> Any:
    """A torchaudio `Resample` with a given kernel: made for equal rates, it computes none of its own."""
    import torchaudio

    resampler = torchaudio.transforms.Resample(1, 1)
    resampler.orig_freq, resampler.new_freq = config["orig_freq"], config["new_freq"]
    resampler.gcd, resampler.width = config["gcd"], config["width"]
    resampler.register_buffer("kernel", kernel)
    return resampler
