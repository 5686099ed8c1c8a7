"""S3Gen's vocoder with regions: turns a mel spectrogram into a waveform."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from chatterbox_prewarm.model.regions.overlap import OverlappingWindows
from chatterbox_prewarm.model.regions.region import VOCODER_PITCH, VOCODER_TRUNK
from chatterbox_prewarm.model.regions.vocoder_blocks import FFT_SIZE, pitch_weights, trunk_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.model.regions.executors import Executor
    from chatterbox_prewarm.model.regions.named_tensors import NamedTensors

_HOP = 4
_TURN = 2 * math.pi
_MAX_MAGNITUDE = 1e2  # upstream clips the magnitude at this value
_MAX_SAMPLE = 0.99  # and the samples at this one
SAMPLE_RATE = 24_000
SAMPLES_PER_FRAME = 480
#: S3Gen silences the first 20 ms and fades the next 20 ms in.
_FADE_SAMPLES = 480
#: Settings of the excitation: the pitch and its eight harmonics, their amplitude, the deviation of the noise in voiced
#: frames, and the pitch in Hz above which a frame is voiced.
_WAVES = 9
_AMPLITUDE, _NOISE, _VOICED_HZ = 0.1, 0.003, 10.0
#: How many mel frames on each side the pitch depends on: five convolutions of three frames.
_PITCH_CONTEXT = 5
#: How many frames on each side the waveform depends on: 14.3 frames of the source, mostly because of the residual
#: blocks of the first stage and of its source, and 13.2 frames of the spectrogram.
_TRUNK_CONTEXT = 15
#: How many mel frames a stream keeps until it knows the following frames.
HELD_FRAMES = _PITCH_CONTEXT + _TRUNK_CONTEXT


class Vocoder:
    """Computes the same as upstream's `HiFTGenerator.inference` for one utterance, with the fade-in that S3Gen adds.

    Args:
        weights: of upstream's `HiFTGenerator`; its weight norms are applied once, into new tensors.
        executor: makes the regions callable.
    """

    def __init__(self, weights: NamedTensors, executor: Executor) -> None:
        self._merge = weights.pair("m_source.l_linear")
        device = self._merge[0].device
        self._pitch = executor(VOCODER_PITCH, pitch_weights(weights.below("f0_predictor")))
        self._trunk = executor(VOCODER_TRUNK, trunk_weights(weights))
        self._window = torch.hann_window(FFT_SIZE, dtype=torch.float64).float().to(device)
        ramp = (torch.cos(torch.linspace(math.pi, 0, _FADE_SAMPLES)) + 1) / 2
        self._fade = torch.cat([torch.zeros(_FADE_SAMPLES), ramp]).to(device)

    @torch.inference_mode()
    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        """Compute the waveform of an utterance. The noise comes from the global generators, as in upstream.

        Args:
            mel: (1, 80, frames).

        Returns:
            (480 frames,), 24 kHz, within [-0.99, 0.99].
        """
        wave = self.sound(mel, Source(self._merge)(self.pitch(mel)))
        self.fade_in(wave, 0)
        return wave

    def pitch(self, mel: torch.Tensor) -> torch.Tensor:
        """Predict the fundamental frequency in Hz, (1, frames), of a mel spectrogram, (1, 80, frames)."""
        return self._pitch(mel)[0]

    def sound(self, mel: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Compute the waveform (480 frames,) without fade-in from mel (1, 80, frames) and source (1, 480 frames)."""
        spectrum = torch.view_as_real(
            torch.stft(source, FFT_SIZE, _HOP, FFT_SIZE, window=self._window, return_complex=True)
        )
        magnitude, phase = self._trunk(mel, torch.cat([spectrum[..., 0], spectrum[..., 1]], dim=1))
        wave = self._inverse(torch.polar(magnitude.clip(max=_MAX_MAGNITUDE), phase))
        return wave.clamp(-_MAX_SAMPLE, _MAX_SAMPLE)

    def fade_in(self, wave: torch.Tensor, begin: int) -> None:
        """Apply S3Gen's fade-in in place to a part of the waveform, (samples,), that begins at sample `begin`."""
        fade = self._fade[begin : begin + wave.numel()]
        wave[: fade.numel()] *= fade

    def stream(self, generator: torch.Generator | None = None) -> VocoderStream:
        """Start the waveform of an utterance whose spectrogram arrives in pieces.

        Args:
            generator: the CPU generator for the noise; None uses the global generators.
        """
        return VocoderStream(self, Source(self._merge, generator))

    def _inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Apply the inverse short-time Fourier transform to (1, 9, n): 4 (n - 1) samples.

        `torch.istft` would need a host sync to check that the windows cover every sample. A Hann window of four hops
        does.
        """
        frames = torch.fft.irfft(spectrum, n=FFT_SIZE, dim=1) * self._window[:, None]
        count = frames.size(2)
        length = FFT_SIZE + _HOP * (count - 1)
        summed = functional.fold(frames, (1, length), (1, FFT_SIZE), stride=(1, _HOP)).view(length)
        covered = self._window.square()[None, :, None].expand(1, FFT_SIZE, count)
        weight = functional.fold(covered, (1, length), (1, FFT_SIZE), stride=(1, _HOP)).view(length)
        half = FFT_SIZE // 2
        return summed[half : length - half] / weight[half : length - half]


class VocoderStream:
    """Computes the waveform of a spectrogram that arrives in pieces. The result has no seams.

    Pitch and waveform are computed in windows that overlap by the context of their convolutions, and the phase of the
    excitation continues from piece to piece. So no cross-fades are needed.
    """

    def __init__(self, vocoder: Vocoder, source: Source) -> None:
        self._vocoder = vocoder
        self._source = source
        self._pitches = OverlappingWindows(lambda mel: vocoder.pitch(mel)[0], context=_PITCH_CONTEXT)
        self._sounds = OverlappingWindows(self._sound, context=_TRUNK_CONTEXT)
        self._waiting: torch.Tensor | None = None
        self._samples_done = 0

    @torch.inference_mode()
    def excite(self, mel: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Add a piece of the spectrogram, (1, 80, frames), and compute the excitation of all frames that are ready.

        Returns:
            (1, 80 + 480, frames): the spectrogram, and below it the 480 samples of excitation of each frame.
        """
        waiting = mel if self._waiting is None else torch.cat([self._waiting, mel], dim=2)
        pitch = self._pitches(mel, last=last)
        count = pitch.numel()
        self._waiting = waiting[..., count:]
        if not count:
            return mel.new_empty(1, mel.size(1) + SAMPLES_PER_FRAME, 0)
        source = self._source(pitch[None]).view(1, count, SAMPLES_PER_FRAME).transpose(1, 2)
        return torch.cat([waiting[..., :count], source], dim=1)

    @torch.inference_mode()
    def sound(self, excited: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Add a result of `excite` and compute the samples, (samples,), that later pieces cannot change."""
        wave = self._sounds(excited, last=last)
        self._vocoder.fade_in(wave, self._samples_done)
        self._samples_done += wave.numel()
        return wave

    def _sound(self, excited: torch.Tensor) -> torch.Tensor:
        mel, source = excited[:, :-SAMPLES_PER_FRAME], excited[:, -SAMPLES_PER_FRAME:]
        return self._vocoder.sound(mel.contiguous(), source.transpose(1, 2).reshape(1, -1))


class Source:
    """Generates the excitation signal: harmonics of the pitch in voiced frames, noise in unvoiced ones.

    Upstream draws the phases with `torch.distributions`, which checks constants on the host and, since torch 2.11,
    imports the compiler for that. Here and in upstream they are drawn on the CPU, for any device.

    Args:
        merge: the weight and the bias of the layer that merges the waves.
        generator: the CPU generator; None uses the global generators, as upstream does.
    """

    def __init__(self, merge: Sequence[torch.Tensor], generator: torch.Generator | None = None) -> None:
        self._merge = merge
        self._generator = generator
        self._cycles: torch.Tensor | None = None
        self._phase: torch.Tensor | None = None

    def __call__(self, pitch: torch.Tensor) -> torch.Tensor:
        """Generate the excitation of the frames that follow the previous call's.

        Args:
            pitch: (1, frames), Hz.

        Returns:
            (1, 480 frames), within [-1, 1].
        """
        frequency = pitch[:, None].repeat_interleave(SAMPLES_PER_FRAME, dim=2)
        voiced = (frequency > _VOICED_HZ).to(pitch.dtype)
        harmonics = torch.arange(1, _WAVES + 1, device=pitch.device)[:, None]
        cycles = (frequency * harmonics / SAMPLE_RATE).cumsum(dim=2)
        if self._cycles is not None:
            cycles = cycles + self._cycles
        self._cycles = cycles[..., -1:] % 1
        if self._phase is None:
            phase = torch.rand((1, *harmonics.shape), generator=self._generator) * _TURN - _TURN / 2
            phase[:, 0] = 0.0
            self._phase = phase.to(pitch.device, non_blocking=True)
        waves = _AMPLITUDE * torch.sin(_TURN * (cycles % 1) + self._phase)
        if self._generator is None:
            noise = torch.randn_like(waves)
        else:
            # Draw frame by frame, so that the noise does not depend on the size of the pieces.
            shape = (pitch.size(1), harmonics.size(0), SAMPLES_PER_FRAME)
            noise = torch.randn(shape, generator=self._generator).to(waves.device)
            noise = noise.transpose(0, 1).reshape(waves.shape)
        loudness = voiced * _NOISE + (1 - voiced) * _AMPLITUDE / 3
        waves = waves * voiced + loudness * noise
        return torch.tanh(functional.linear(waves.transpose(1, 2), *self._merge)).transpose(1, 2)[:, 0]
