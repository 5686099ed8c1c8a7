"""S3Gen's vocoder with regions: a mel spectrogram to a waveform."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from chatterbox_prewarm.model.regions.overlap import Windows
from chatterbox_prewarm.model.regions.region import VOCODER_PITCH, VOCODER_TRUNK
from chatterbox_prewarm.model.regions.vocoder_blocks import FFT_SIZE, pitch_weights, trunk_weights

if TYPE_CHECKING:
    from chatterbox_prewarm.model.regions.executors import Executor

_HOP = 4
_TURN = 2 * math.pi
_LOUDEST_BIN = 1e2  # upstream's clip of the magnitude
SAMPLES_PER_FRAME = 480
#: How many mel frames to each side the pitch depends on: five convolutions of three.
_PITCH_CONTEXT = 5
#: And the waveform: on 14.3 frames of the source, most of them for the residual blocks of the first stage and those of
#: its source, and on 13.2 of the spectrogram.
_TRUNK_CONTEXT = 15
#: How many mel frames a stream holds back until it knows what follows.
HELD_FRAMES = _PITCH_CONTEXT + _TRUNK_CONTEXT


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

    @torch.inference_mode()
    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        """Make sound.

        Args:
            mel: (1, 80, frames).

        Returns:
            (480 frames,), 24 kHz, within [-0.99, 0.99]; noise is drawn as upstream draws it.
        """
        wave = self.sound(mel, Source(self._hift)(self.pitch(mel)))
        self.fade_in(wave, 0)
        return wave

    def pitch(self, mel: torch.Tensor) -> torch.Tensor:
        """The fundamental frequency, (1, 80, frames) to (1, frames), Hz."""
        return self._pitch(mel)[0]

    def sound(self, mel: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """The waveform without the fade-in, from mel (1, 80, frames) and excitation (1, 480 frames)."""
        spectrum = torch.view_as_real(
            torch.stft(source, FFT_SIZE, _HOP, FFT_SIZE, window=self._window, return_complex=True)
        )
        magnitude, phase = self._trunk(mel, torch.cat([spectrum[..., 0], spectrum[..., 1]], dim=1))
        wave = self._inverse(torch.polar(magnitude.clip(max=_LOUDEST_BIN), phase))
        limit = self._hift.audio_limit
        return wave.clamp(-limit, limit)

    def fade_in(self, wave: torch.Tensor, begin: int) -> None:
        """Apply S3Gen's fade-in to a part of the waveform, in place.

        Args:
            wave: (samples,).
            begin: where in the utterance it begins.
        """
        fade = self._fade[begin : begin + wave.numel()]
        wave[: fade.numel()] *= fade

    def stream(self, generator: torch.Generator | None = None) -> VocoderStream:
        """The same for one spectrogram that comes in pieces.

        Args:
            generator: of the CPU, which noise is drawn from; None draws it as a call does.
        """
        return VocoderStream(self, Source(self._hift, generator))

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


class VocoderStream:
    """The vocoder over a spectrogram that comes in pieces: the waveform of the whole, without a seam.

    Pitch and waveform are made in windows that overlap by all that their convolutions see, and the phase of the
    excitation goes on from piece to piece. So nothing has to be faded into one another.
    """

    def __init__(self, vocoder: Vocoder, source: Source) -> None:
        self._vocoder = vocoder
        self._source = source
        self._pitches = Windows(lambda mel: vocoder.pitch(mel)[0], context=_PITCH_CONTEXT)
        self._sounds = Windows(self._sound, context=_TRUNK_CONTEXT)
        self._waiting: torch.Tensor | None = None
        self._made = 0

    @torch.inference_mode()
    def excite(self, mel: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Take more of the spectrogram, (1, 80, frames), and give what `sound` takes, for as many frames as can be.

        Returns:
            (1, 80 + 480, frames): the spectrogram with the samples of its excitation below.
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
        """Take more of what `excite` gave.

        Returns:
            (samples,), those that nothing which may follow has a part in.
        """
        wave = self._sounds(excited, last=last)
        self._vocoder.fade_in(wave, self._made)
        self._made += wave.numel()
        return wave

    def _sound(self, excited: torch.Tensor) -> torch.Tensor:
        mel, source = excited[:, :-SAMPLES_PER_FRAME], excited[:, -SAMPLES_PER_FRAME:]
        return self._vocoder.sound(mel.contiguous(), source.transpose(1, 2).reshape(1, -1))


class Source:
    """The excitation of a voice: harmonics of the pitch where there is one, noise where there is none.

    Upstream draws the phases through `torch.distributions`, which checks its own constants on the host, and since
    torch 2.11 imports the compiler to do so. They are drawn on the CPU on any device, as upstream's are.

    Args:
        hift: of upstream.
        generator: of the CPU; None draws from the generators that upstream draws from.
    """

    def __init__(self, hift: Any, generator: torch.Generator | None = None) -> None:
        self._hift = hift
        self._generator = generator
        self._cycles: torch.Tensor | None = None
        self._phase: torch.Tensor | None = None

    def __call__(self, pitch: torch.Tensor) -> torch.Tensor:
        """Go on from where the last call ended.

        Args:
            pitch: (1, frames), Hz.

        Returns:
            (1, 480 frames), within [-1, 1].
        """
        module = self._hift.m_source
        sines = module.l_sin_gen
        frequency = self._hift.f0_upsamp(pitch[:, None])
        voiced = (frequency > sines.voiced_threshold).to(pitch.dtype)
        harmonics = torch.arange(1, sines.harmonic_num + 2, device=pitch.device)[:, None]
        cycles = (frequency * harmonics / sines.sampling_rate).cumsum(dim=2)
        if self._cycles is not None:
            cycles = cycles + self._cycles
        self._cycles = cycles[..., -1:] % 1
        if self._phase is None:
            phase = torch.rand((1, *harmonics.shape), generator=self._generator) * _TURN - _TURN / 2
            phase[:, 0] = 0.0
            self._phase = phase.to(pitch.device, non_blocking=True)
        waves = sines.sine_amp * torch.sin(_TURN * (cycles % 1) + self._phase)
        if self._generator is None:
            noise = torch.randn_like(waves)
        else:
            # Frame after frame, so that it is the same however many come at once.
            shape = (pitch.size(1), harmonics.size(0), SAMPLES_PER_FRAME)
            noise = torch.randn(shape, generator=self._generator).to(waves.device)
            noise = noise.transpose(0, 1).reshape(waves.shape)
        loudness = voiced * sines.noise_std + (1 - voiced) * sines.sine_amp / 3
        waves = waves * voiced + loudness * noise
        return torch.tanh(module.l_linear(waves.transpose(1, 2))).transpose(1, 2)[:, 0]
