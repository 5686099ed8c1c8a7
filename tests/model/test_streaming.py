"""Test streaming: the tokens of a synthesis, no seams, the watermark, and the end of a closed stream."""

from __future__ import annotations

import logging
import random
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import chatterbox_prewarm
from chatterbox_prewarm.errors import BadInputError, ModelError, NotWarmError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions import vocoder as vocoder_module
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.overlap import OverlappingWindows
from chatterbox_prewarm.model.regions.t3_blocks import STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.regions.vocoder import SAMPLES_PER_FRAME, Source
from chatterbox_prewarm.model.stream import Stream
from chatterbox_prewarm.model.streaming import generate_stream
from chatterbox_prewarm.model.synthesis import Speech, Synthesizer
from chatterbox_prewarm.start.attach import Attached
from chatterbox_prewarm.start.streaming import generate_stream_with_warmup_check
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatterbox.tts import ChatterboxTTS
    from numpy.typing import NDArray

    from chatterbox_prewarm.model.chunk import Chunk

TEXT = "Hello, world."
#: Random weights also draw tokens outside the codebook. About three in four are usable.
COUNT = 60
SAMPLES_PER_TOKEN = 2 * SAMPLES_PER_FRAME
#: Arguments of a stream with look-ahead and several short chunks.
EARLY: dict[str, Any] = {"seed": 7, "max_new_tokens": COUNT, "chunk_tokens": 8, "look_ahead": 3}


@pytest.fixture(scope="module")
def synthesizer(attached: Attached) -> Synthesizer:
    return attached.synthesizer


@pytest.fixture(scope="module")
def speech(synthesizer: Synthesizer) -> Speech:
    """Return the synthesis without streaming."""
    return synthesizer.synthesize(TEXT, seed=7, max_new_tokens=COUNT)


@pytest.fixture(scope="module")
def early(synthesizer: Synthesizer) -> list[Chunk]:
    return list(generate_stream(synthesizer, TEXT, **EARLY))


def samples_of(chunks: Sequence[Chunk]) -> NDArray[np.float32]:
    return np.concatenate([chunk.samples for chunk in chunks])


def tokens_of(chunks: Sequence[Chunk]) -> list[int]:
    return [int(token) for chunk in chunks for token in chunk.tokens]


def decibels(signal: Any, other: Any) -> float:
    """Return the energy of a signal relative to the energy of its difference from `other`, in dB."""
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(signal - other).sum(), 1e-30)))


def joints(chunks: Sequence[Chunk]) -> list[int]:
    return [int(end) for end in np.cumsum([len(chunk.samples) for chunk in chunks])[:-1]]


def drawn_by(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns how many tokens T3 has drawn since this call."""
    steps = 0
    advance = decoder._advance

    def counted(*arguments: Any, **named: Any) -> None:
        nonlocal steps
        steps += 1
        advance(*arguments, **named)

    monkeypatch.setattr(decoder, "_advance", counted)
    return lambda: steps


@pytest.mark.parametrize("chunk_tokens", [9, 16])
def test_stream_equals_the_synthesis_with_the_same_seed(
    synthesizer: Synthesizer, speech: Speech, chunk_tokens: int
) -> None:
    chunks = list(
        generate_stream(synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=chunk_tokens),
    )
    assert tokens_of(chunks) == speech.tokens.tolist()
    found = samples_of(chunks)
    assert found.dtype == np.float32
    assert found.shape == speech.samples.shape
    assert decibels(speech.samples, found) >= 80
    # No click: the difference is not larger near a joint than elsewhere.
    difference = np.abs(found - speech.samples)
    for joint in joints(chunks):
        assert difference[joint - 48 : joint + 48].max() <= 1e-4 * np.abs(speech.samples).max()


def test_chunks_have_the_right_sizes_and_attributes(synthesizer: Synthesizer, speech: Speech) -> None:
    chunks = list(generate_stream(synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=16))
    full, rest = divmod(len(speech.tokens), 16)
    assert rest, "otherwise the last chunk is not shorter"
    assert [len(chunk.tokens) for chunk in chunks] == [16] * full + [rest]
    assert [len(chunk.samples) for chunk in chunks] == [SAMPLES_PER_TOKEN * len(chunk.tokens) for chunk in chunks]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.is_last for chunk in chunks] == [False] * full + [True]
    seconds = [chunk.seconds for chunk in chunks]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    pcm = np.concatenate([chunk.pcm for chunk in chunks])
    assert pcm.dtype == np.int16
    assert np.abs(pcm.astype(int) - speech.pcm).max() <= 1, "to within rounding"


def test_speech_shorter_than_a_chunk_is_a_single_last_chunk(synthesizer: Synthesizer) -> None:
    for look_ahead in (None, 3):
        (chunk,) = generate_stream(synthesizer, TEXT, seed=1, max_new_tokens=8, look_ahead=look_ahead)
        assert chunk.is_last
        assert chunk.index == 0
        assert 3 <= len(chunk.tokens) <= 8
        assert len(chunk.samples) == SAMPLES_PER_TOKEN * len(chunk.tokens)


def test_no_empty_chunk_follows_if_the_speech_ends_with_a_chunk(synthesizer: Synthesizer, speech: Speech) -> None:
    (chunk,) = generate_stream(
        synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=len(speech.tokens), look_ahead=3
    )
    assert chunk.is_last
    assert len(chunk.tokens) == len(speech.tokens)


@pytest.mark.parametrize("look_ahead", [None, 3])
def test_a_stream_and_a_synthesis_tell_whether_the_token_limit_ended_the_speech(
    synthesizer: Synthesizer, look_ahead: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random token takes the part of the stop token, which random weights do not draw at a known place."""
    blocks = torch.cat(list(synthesizer.token_blocks(TEXT, max_new_tokens=20)))
    stop = STOP_SPEECH_TOKEN

    def truncated(*, with_stop_token: bool) -> list[bool]:
        drawn = torch.cat([blocks[blocks != stop], torch.tensor([stop] * with_stop_token, dtype=torch.int64)])
        monkeypatch.setattr(synthesizer, "token_blocks", lambda *_, **__: (block for block in torch.split(drawn, 7)))
        monkeypatch.setattr(type(synthesizer.model.decoder), "__call__", lambda *_, **__: drawn)
        chunks = list(generate_stream(synthesizer, TEXT, seed=7, chunk_tokens=4, look_ahead=look_ahead))
        assert len(chunks) > 1
        return [synthesizer.synthesize(TEXT, seed=7).is_truncated, chunks[-1].is_truncated]

    assert truncated(with_stop_token=False) == [True, True]
    assert truncated(with_stop_token=True) == [False, False]


def test_look_ahead_draws_the_same_tokens(early: list[Chunk], speech: Speech) -> None:
    assert tokens_of(early) == speech.tokens.tolist()
    assert len(samples_of(early)) == len(speech.samples)
    assert len(early) > 4
    assert np.isfinite(samples_of(early)).all()


def test_look_ahead_returns_audio_before_the_last_token(
    synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_by(synthesizer.model.decoder, monkeypatch)
    stream = generate_stream(synthesizer, TEXT, **EARLY)
    first = next(stream)
    assert not first.is_last
    assert drawn() < COUNT - 10, "one chunk, the held-back frames and the look-ahead, plus a quarter of unusable tokens"
    stream.close()


@pytest.mark.slow
def test_look_ahead_has_no_seams(synthesizer: Synthesizer, early: list[Chunk], monkeypatch: pytest.MonkeyPatch) -> None:
    """The audio equals the output of vocoder and watermark for the complete spectrogram.

    The spectrogram has no joints: frames at the border of two chunks differ no more than elsewhere.
    """
    pipeline = synthesizer.model
    pieces = []
    stream = Stream(synthesizer, synthesizer.voices[DEFAULT_VOICE], 8, 3, lambda: False)
    mel_chunks = stream._mel_chunks

    def recorded(*arguments: Any) -> Any:
        for piece in mel_chunks(*arguments):
            pieces.append(piece[1])
            yield piece

    monkeypatch.setattr(stream, "_mel_chunks", recorded)
    found = samples_of(list(stream.chunks(synthesizer.token_blocks(TEXT, max_new_tokens=COUNT), 7, 0.0)))
    assert np.array_equal(found, samples_of(early)), "a seed gives the same audio"
    mel = torch.cat(pieces, dim=2)
    generator = torch.Generator().manual_seed((7 + 0x9E3779B9) % 2**32)
    torch.randn((1, 4096, 80), generator=generator)  # the noise of the flow
    vocoder = pipeline.vocoder.stream(generator)
    sound = vocoder.sound(vocoder.excite(mel, last=True), last=True)
    assert decibels(synthesizer.model.marked(sound.numpy()), found) >= 60
    jumps = (mel[..., 1:] - mel[..., :-1]).square().mean(dim=(0, 1)).sqrt()
    borders = np.cumsum([piece.size(2) for piece in pieces])[:-1]
    assert len(borders) > 1
    for border in borders:
        assert jumps[border - 1] <= 1.2 * jumps.quantile(0.95)


@pytest.mark.slow
def test_use_of_the_generators_between_chunks_does_not_change_the_stream(
    synthesizer: Synthesizer, early: list[Chunk]
) -> None:
    found = []
    for chunk in generate_stream(synthesizer, TEXT, **EARLY):
        found.append(chunk)
        assert not torch.is_inference_mode_enabled(), "inference mode must not affect the caller"
        torch.manual_seed(chunk.index)
        random.seed(chunk.index)
        if chunk.index == 1:
            synthesizer.synthesize("Another one.", seed=2, max_new_tokens=6)
    assert tokens_of(found) == tokens_of(early)
    assert np.array_equal(samples_of(found), samples_of(early))


def test_closing_a_stream_stops_the_synthesis(
    synthesizer: Synthesizer, speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_by(synthesizer.model.decoder, monkeypatch)
    blocks = synthesizer.token_blocks(TEXT, max_new_tokens=COUNT)
    monkeypatch.setattr(synthesizer, "token_blocks", lambda *_, **__: blocks)
    stream = generate_stream(synthesizer, TEXT, **EARLY)
    next(stream)
    before = drawn()
    assert before < COUNT - 1
    stream.close()
    assert drawn() == before
    assert list(stream) == []
    assert list(blocks) == [], "the KV cache is free again"
    monkeypatch.undo()
    repeated = synthesizer.synthesize(TEXT, seed=7, max_new_tokens=COUNT)
    assert repeated.pcm_sha256 == speech.pcm_sha256


@pytest.mark.parametrize("look_ahead", [None, 3])
def test_stopped_stream_ends_before_the_first_chunk(
    synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch, look_ahead: int | None
) -> None:
    drawn = drawn_by(synthesizer.model.decoder, monkeypatch)
    stream = generate_stream(
        synthesizer, TEXT, seed=7, max_new_tokens=COUNT, look_ahead=look_ahead, stopped=lambda: drawn() >= 4
    )
    assert list(stream) == []
    assert drawn() == 4


def test_stopped_stream_ends_between_chunks(synthesizer: Synthesizer) -> None:
    gone = threading.Event()
    stream = generate_stream(synthesizer, TEXT, **EARLY, stopped=gone.is_set)
    assert not next(stream).is_last
    gone.set()
    assert list(stream) == []


def test_every_part_of_a_stream_has_the_watermark(
    synthesizer: Synthesizer, upstream: ChatterboxTTS, early: list[Chunk]
) -> None:
    watermarker, rate = upstream.watermarker, synthesizer.model.sample_rate
    exact = list(generate_stream(synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=9))
    for chunks in (exact, early):
        samples = samples_of(chunks)
        assert watermarker.get_watermark(samples, sample_rate=rate, round=False).mean() > 0.9
        for begin in range(0, len(samples) - 12_000, 12_000):
            part = watermarker.get_watermark(samples[begin : begin + 12_000], sample_rate=rate, round=False)
            assert part.mean() > 0.5, f"half a second from sample {begin} on"


def test_watermark_in_windows_equals_the_watermark_of_the_complete_audio(synthesizer: Synthesizer) -> None:
    generator = np.random.default_rng(0)
    time = np.arange(240 * 150) / 24_000
    samples = (0.2 * np.sin(2 * np.pi * 180 * time) * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)
    samples += 0.02 * generator.standard_normal(len(samples)).astype(np.float32)
    stream = Stream(synthesizer, synthesizer.voices[DEFAULT_VOICE], 25, None, lambda: False)
    windows = OverlappingWindows(stream._watermarked, context=24)
    pieces = torch.split(torch.from_numpy(samples).view(-1, 240).T, [10, 60, 0, 50, 30], dim=1)
    found = torch.cat([windows(piece, last=number == 4) for number, piece in enumerate(pieces)]).numpy()
    complete = synthesizer.model.marked(samples)
    assert decibels(complete, samples) < 40, "the watermark changes the audio; otherwise this test detects nothing"
    assert decibels(complete, found) >= 80


@pytest.mark.parametrize("sizes", [[40], [7, 1, 20, 0, 12], [1] * 40])
def test_overlapping_windows_give_the_output_for_the_complete_signal(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 5, generator=generator)
    signal = torch.randn(1, 2, 40, generator=generator)

    def convolved(x: torch.Tensor) -> torch.Tensor:
        return functional.conv1d(x, kernel, padding=2)[0].T.reshape(-1)

    windows = OverlappingWindows(convolved, context=2)
    pieces = torch.split(signal, sizes, dim=2)
    found = [windows(piece, last=number == len(sizes)) for number, piece in enumerate(pieces, start=1)]
    torch.testing.assert_close(torch.cat(found), convolved(signal))
    too_small = OverlappingWindows(convolved, context=1)
    found = [too_small(piece, last=number == len(sizes)) for number, piece in enumerate(pieces, start=1)]
    assert torch.allclose(torch.cat(found), convolved(signal)) == (len(sizes) == 1), (
        "a smaller context gives another output"
    )


def test_vocoder_in_pieces_gives_the_audio_of_the_complete_spectrogram(synthesizer: Synthesizer) -> None:
    vocoder = synthesizer.model.vocoder
    mel = 2 * torch.randn(1, 80, 120, generator=torch.Generator().manual_seed(1)) - 5

    def sound(sizes: list[int]) -> Any:
        stream = vocoder.stream(torch.Generator().manual_seed(2))
        found = []
        for number, piece in enumerate(torch.split(mel, sizes, dim=2), start=1):
            last = number == len(sizes)
            found.append(stream.sound(stream.excite(piece, last=last), last=last))
        return torch.cat(found).numpy()

    complete = sound([120])
    assert complete.shape == (120 * SAMPLES_PER_FRAME,)
    assert not complete[:SAMPLES_PER_FRAME].any(), "S3Gen fades in after 20 ms of silence"
    assert complete[SAMPLES_PER_FRAME:].any()
    assert decibels(complete, sound([30, 1, 49, 40])) >= 80


def test_context_of_the_vocoder_is_exact(synthesizer: Synthesizer) -> None:
    """NaN in one frame spreads to all frames that depend on it, for any weights."""
    vocoder = synthesizer.model.vocoder
    mel, source = torch.zeros(1, 80, 100), torch.zeros(1, 100 * SAMPLES_PER_FRAME)
    spoilt_mel, spoilt_source = mel.clone(), source.clone()
    spoilt_mel[..., 50] = torch.nan
    spoilt_source[:, 50 * SAMPLES_PER_FRAME : 51 * SAMPLES_PER_FRAME] = torch.nan

    def reach(found: torch.Tensor) -> float:
        """Return the maximum distance in frames to which NaN spreads."""
        positions = found.isnan().nonzero()[:, 0] * 100 / found.numel()
        return max(50 - float(positions[0]), float(positions[-1]) - 50)

    with torch.inference_mode():
        assert reach(vocoder.pitch(spoilt_mel)[0]) == vocoder_module._PITCH_CONTEXT
        assert reach(vocoder.sound(spoilt_mel, source)) <= vocoder_module._TRUNK_CONTEXT + 1
        found = reach(vocoder.sound(mel, spoilt_source)) - 1
    assert vocoder_module._TRUNK_CONTEXT - 1 < found <= vocoder_module._TRUNK_CONTEXT


def test_phase_of_the_source_continues_from_chunk_to_chunk(synthesizer: Synthesizer) -> None:
    """Random weights give no voiced frame, so this test gives the source a pitch."""
    merge = NamedTensors(synthesizer.model.tensors, "s3gen.mel2wav.").pair("m_source.l_linear")
    pitch = 200 + 80 * torch.sin(torch.arange(120) / 9)[None]
    sizes = [40, 1, 49, 30]

    def source() -> Source:
        return Source(merge, torch.Generator().manual_seed(3))

    with torch.inference_mode():
        complete = source()(pitch)
        continued = source()
        found = torch.cat([continued(piece) for piece in torch.split(pitch, sizes, dim=1)], dim=1)
        restarted = torch.cat([source()(piece) for piece in torch.split(pitch, sizes, dim=1)], dim=1)
    wave, found_wave, restarted_wave = (x.numpy() - float(complete.mean()) for x in (complete, found, restarted))
    assert decibels(wave, found_wave) >= 40
    assert decibels(wave, restarted_wave) < 10, "otherwise the phase has no effect"


@pytest.mark.parametrize("look_ahead", [None, 3])
def test_voice_with_a_surplus_frame_can_be_streamed(synthesizer: Synthesizer, look_ahead: int | None) -> None:
    voice = synthesizer.voices[DEFAULT_VOICE]
    frames = torch.cat([voice.gen["prompt_feat"], voice.gen["prompt_feat"][:, -1:]], dim=1)
    voice = replace(voice, gen={**voice.gen, "prompt_feat": frames})
    odd = Synthesizer(synthesizer.model, {DEFAULT_VOICE: voice})
    speech = odd.synthesize(TEXT, seed=7, max_new_tokens=COUNT // 2)
    chunks = list(
        generate_stream(odd, TEXT, seed=7, max_new_tokens=COUNT // 2, chunk_tokens=8, look_ahead=look_ahead),
    )
    assert len(speech.samples) == SAMPLES_PER_FRAME * (2 * len(speech.tokens) - 1)
    assert len(samples_of(chunks)) == len(speech.samples)
    assert tokens_of(chunks) == speech.tokens.tolist()
    if look_ahead is None:
        assert decibels(speech.samples, samples_of(chunks)) >= 80


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"text": ""}, "empty"),
        ({"voice": "unknown"}, "no voice"),
        ({"seed": -1}, "seed"),
        ({"chunk_tokens": 0}, "chunk of 0 tokens"),
        ({"look_ahead": 2}, "look ahead of 2 tokens"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused_at_the_call(
    synthesizer: Synthesizer, arguments: dict[str, Any], word: str
) -> None:
    with pytest.raises(BadInputError, match=word):
        generate_stream(synthesizer, **{"text": TEXT, **arguments})


@pytest.mark.parametrize("look_ahead", [None, 3])
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens_are_an_error(synthesizer: Synthesizer, count: int, look_ahead: int | None) -> None:
    with pytest.raises(ModelError, match="too few"):
        next(generate_stream(synthesizer, TEXT, seed=1, max_new_tokens=count, look_ahead=look_ahead))


def test_cold_model_does_not_stream_under_require(attached: Attached) -> None:
    """This start had no state, so it has misses in every family."""
    with pytest.raises(NotWarmError, match=r"expected no misses, found .* in conditionals") as caught:
        generate_stream_with_warmup_check(attached, TEXT, policy="require")
    assert "bake a state" in caught.value.next_step
    assert set(attached.reasons) <= set(attached.metrics.next_steps)
    options = replace(attached.prepared.options, policy="require")
    required = replace(attached, prepared=replace(attached.prepared, options=options))
    with pytest.raises(NotWarmError):
        generate_stream_with_warmup_check(required, TEXT)
    with pytest.raises(BadInputError, match="no policy 'perhaps'"):
        generate_stream_with_warmup_check(attached, TEXT, policy="perhaps")


@pytest.mark.parametrize(("policy", "warns"), [("fallback", True), ("off", False), (None, False)])
def test_cold_model_streams_with_a_warning_under_fallback(
    attached: Attached, caplog: pytest.LogCaptureFixture, policy: str | None, *, warns: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        chunks = list(generate_stream_with_warmup_check(attached, TEXT, policy=policy, seed=1, max_new_tokens=8))
    assert chunks[-1].is_last
    assert ("the model is not warm" in caplog.text) == warns


def test_model_that_was_warm_when_attached_streams_under_require(
    attached: Attached, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(attached.prepared.options, policy="require")
    prepared = replace(attached.prepared, options=options, metrics=StartMetrics())
    reason = "a module for a voice was imported after the start"
    prepared.metrics.miss("bytecode", reason, count=670, next_step="")
    warm = Attached(synthesizer=attached.synthesizer, prepared=prepared, misses={}, reasons=())
    with caplog.at_level(logging.WARNING):
        chunks = list(generate_stream_with_warmup_check(warm, TEXT, seed=1, max_new_tokens=8))
    assert chunks[-1].is_last
    assert "not warm" not in caplog.text


def test_streaming_functions_are_public() -> None:
    assert chatterbox_prewarm.generate_stream is generate_stream
    assert chatterbox_prewarm.generate_stream_with_warmup_check is generate_stream_with_warmup_check
