"""S3Gen's vocoder with regions: a mel spectrogram to a waveform."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from chatterbox_prewarm.regions import VOCODER_PITCH, VOCODER_TRUNK
from chatterbox_prewarm.regions.vocoder_blocks import FFT_SIZE, pitch_weights, trunk_weights

if TYPE_CHECKING:
    from chatterbox_prewarm.regions.execute import Executor

_HOP = 4
_TURN = 2 * math.pi
_LOUDEST_BIN = 1e2  # upstream's clip of the magnitude


class Vocoder:
    """Upstream's `HiFTGenerator.inference` for one utterance, and the fade-in that S3Gen adds.

    Args:
        s3gen: of upstream, whose weights are used; weight norms are resolved into tensors of their own.
        executor: makes the regions.
    """

    def __init__(self, s3gen: Any, executor: Executor) -> None:
        self._hift = hift = s3gen.mel2wav
        self._fade = s3gen.trim_fade
        self._pitch = executor(VOCODER_PITCH, pitch_weights(hift.f0_predictor))
        self._trunk = executor(VOCODER_TRUNK, trunk_weights(hift))
        self._window = hift.stft_window.to(self._fade.device)
        self._harmonics = torch.arange(1, hift.m_source.l_sin_gen.harmonic_num + 2, device=self._fade.device)[:, None]

    @torch.inference_mode()
    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        """Make sound.

        Args:
            mel: (1, 80, frames).

        Returns:
            (480 frames,), 24 kHz, within [-0.99, 0.99]; noise is drawn as upstream draws it.
        """
        hift = self._hift
        (pitch,) = self._pitch(mel)
        spectrum = torch.view_as_real(
            torch.stft(self._source(pitch), FFT_SIZE, _HOP, FFT_SIZE, window=self._window, return_complex=True)
        )
        magnitude, phase = self._trunk(mel, torch.cat([spectrum[..., 0], spectrum[..., 1]], dim=1))
        wave = self._inverse(torch.polar(magnitude.clip(max=_LOUDEST_BIN), phase))
        wave = wave.clamp(-hift.audio_limit, hift.audio_limit)
        wave[: self._fade.numel()] *= self._fade
        return wave

    def _source(self, pitch: torch.Tensor) -> torch.Tensor:
        """The excitation of the voice: harmonics of the pitch where there is one, noise where there is none.

        Upstream draws the phases through `torch.distributions`, which checks its own constants on the host, and since
        torch 2.11 imports the compiler to do so. They are drawn on the CPU on any device, as upstream's are.

        Args:
            pitch: (1, frames), Hz.

        Returns:
            (1, 480 frames), within [-1, 1].
        """
        module = self._hift.m_source
        sines = module.l_sin_gen
        frequency = self._hift.f0_upsamp(pitch[:, None])
        voiced = (frequency > sines.voiced_threshold).to(pitch.dtype)
        cycles = (frequency * self._harmonics / sines.sampling_rate).cumsum(dim=2)
        phase = torch.rand((1, *self._harmonics.shape)) * _TURN - _TURN / 2
        phase[:, 0] = 0.0
        waves = sines.sine_amp * torch.sin(_TURN * (cycles % 1) + phase.to(pitch.device, non_blocking=True))
        loudness = voiced * sines.noise_std + (1 - voiced) * sines.sine_amp / 3
        waves = waves * voiced + loudness * torch.randn_like(waves)
        return torch.tanh(module.l_linear(waves.transpose(1, 2))).transpose(1, 2)[:, 0]

    def _inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        """The inverse short-time Fourier transform, (1, 9, n) to 4 (n - 1) samples, without `torch.istft`'s host sync.

        `torch.istft` asks whether the windows cover every sample. A Hann window of four hops does.
        """
        frames = torch.fft.irfft(spectrum, n=FFT_SIZE, dim=1) * self._window[:, None]
        count = frames.size(2)
        length = FFT_SIZE + _HOP * (count - 1)
        summed = functional.fold(frames, (1, length), (1, FFT_SIZE), stride=(1, _HOP)).view(length)
        covered = self._window.square()[None, :, None].expand(1, FFT_SIZE, count)
        weight = functional.fold(covered, (1, length), (1, FFT_SIZE), stride=(1, _HOP)).view(length)
        half = FFT_SIZE // 2
        return summed[half : length - half] / weight[half : length - half]
