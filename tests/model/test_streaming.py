"""A stream is the synthesis itself in chunks: the same tokens, no seam, the watermark, and an end when it is left."""

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
from chatterbox_prewarm.model.regions.overlap import Windows
from chatterbox_prewarm.model.regions.pipeline import bound
from chatterbox_prewarm.model.regions.vocoder import SAMPLES_PER_FRAME, Source
from chatterbox_prewarm.model.streaming import Chunk, _Stream, generate_stream
from chatterbox_prewarm.model.synthesis import Speech, Synthesizer
from chatterbox_prewarm.model.voices import detached
from chatterbox_prewarm.start.attach import Attached
from chatterbox_prewarm.start.streaming import generate_stream_with_warmup_check
from chatterbox_prewarm.system.metrics import WarmupMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

TEXT = "Hello, world."
#: Random weights draw tokens that are no sound, too: some three in four are left.
COUNT = 60
SAMPLES_PER_TOKEN = 2 * SAMPLES_PER_FRAME
#: A stream that looks ahead, with chunks so short that there are several.
EARLY: dict[str, Any] = {"seed": 7, "max_new_tokens": COUNT, "chunk_tokens": 8, "look_ahead": 3}


@pytest.fixture(scope="module")
def synthesizer(attached: Attached) -> Synthesizer:
    return attached.synthesizer


@pytest.fixture(scope="module")
def speech(synthesizer: Synthesizer) -> Speech:
    """In one piece."""
    return synthesizer.synthesize(TEXT, seed=7, max_new_tokens=COUNT)


@pytest.fixture(scope="module")
def early(synthesizer: Synthesizer) -> list[Chunk]:
    return list(generate_stream(synthesizer, TEXT, **EARLY))


def samples_of(chunks: Sequence[Chunk]) -> NDArray[np.float32]:
    return np.concatenate([chunk.samples for chunk in chunks])


def tokens_of(chunks: Sequence[Chunk]) -> list[int]:
    return [int(token) for chunk in chunks for token in chunk.tokens]


def decibels(signal: Any, other: Any) -> float:
    """The energy of a signal over that of its difference from another."""
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(signal - other).sum(), 1e-30)))


def joints(chunks: Sequence[Chunk]) -> list[int]:
    return [int(end) for end in np.cumsum([len(chunk.samples) for chunk in chunks])[:-1]]


def drawn_by(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many tokens T3 has drawn from now on."""
    steps = 0
    advance = decoder._advance

    def counted(*arguments: Any, **named: Any) -> None:
        nonlocal steps
        steps += 1
        advance(*arguments, **named)

    monkeypatch.setattr(decoder, "_advance", counted)
    return lambda: steps


@pytest.mark.parametrize("chunk_tokens", [9, 16])
def test_a_stream_is_the_synthesis_of_the_same_seed(
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
    # No click: near a joint the stream is no further from the one piece than anywhere.
    difference = np.abs(found - speech.samples)
    for joint in joints(chunks):
        assert difference[joint - 48 : joint + 48].max() <= 1e-4 * np.abs(speech.samples).max()


def test_chunks_say_what_they_are(synthesizer: Synthesizer, speech: Speech) -> None:
    chunks = list(generate_stream(synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=16))
    whole, rest = divmod(len(speech.tokens), 16)
    assert rest, "or the last chunk is none that is short"
    assert [len(chunk.tokens) for chunk in chunks] == [16] * whole + [rest]
    assert [len(chunk.samples) for chunk in chunks] == [SAMPLES_PER_TOKEN * len(chunk.tokens) for chunk in chunks]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.is_last for chunk in chunks] == [False] * whole + [True]
    seconds = [chunk.seconds for chunk in chunks]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    pcm = np.concatenate([chunk.pcm for chunk in chunks])
    assert pcm.dtype == np.int16
    assert np.abs(pcm.astype(int) - speech.pcm).max() <= 1, "to within rounding"


def test_speech_shorter_than_a_chunk_is_one_last_chunk(synthesizer: Synthesizer) -> None:
    for look_ahead in (None, 3):
        (chunk,) = generate_stream(synthesizer, TEXT, seed=1, max_new_tokens=8, look_ahead=look_ahead)
        assert chunk.is_last
        assert chunk.index == 0
        assert 3 <= len(chunk.tokens) <= 8
        assert len(chunk.samples) == SAMPLES_PER_TOKEN * len(chunk.tokens)


def test_chunks_that_end_with_the_speech_leave_no_empty_one(synthesizer: Synthesizer, speech: Speech) -> None:
    (chunk,) = generate_stream(
        synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=len(speech.tokens), look_ahead=3
    )
    assert chunk.is_last
    assert len(chunk.tokens) == len(speech.tokens)


def test_a_stream_that_looks_ahead_draws_the_same_tokens(early: list[Chunk], speech: Speech) -> None:
    assert tokens_of(early) == speech.tokens.tolist()
    assert len(samples_of(early)) == len(speech.samples)
    assert len(early) > 4
    assert np.isfinite(samples_of(early)).all()


def test_a_stream_that_looks_ahead_speaks_before_the_last_token(
    synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_by(bound(synthesizer.model).speech_tokens, monkeypatch)
    stream = generate_stream(synthesizer, TEXT, **EARLY)
    first = next(stream)
    assert not first.is_last
    assert drawn() < COUNT - 10, "a chunk, what the windows hold back, and the look ahead; a fourth more is no sound"
    stream.close()


def test_a_stream_that_looks_ahead_has_no_seam(
    synthesizer: Synthesizer, early: list[Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sound is that of one spectrogram, put through the vocoder and the watermark in one piece.

    And that has no joints: where a rendering goes over into the next, frames differ by no more than elsewhere.
    """
    stages = bound(synthesizer.model)
    pieces = []
    stream = _Stream(synthesizer, synthesizer.voices[DEFAULT_VOICE], 8, 3, lambda: False)
    settled = stream._settled

    def noted(*arguments: Any) -> Any:
        for piece in settled(*arguments):
            pieces.append(piece[1])
            yield piece

    monkeypatch.setattr(stream, "_settled", noted)
    found = samples_of(list(stream.chunks(synthesizer.token_blocks(TEXT, max_new_tokens=COUNT), 7, 0.0)))
    assert np.array_equal(found, samples_of(early)), "a seed repeats"
    mel = torch.cat(pieces, dim=2)
    generator = torch.Generator().manual_seed((7 + 0x9E3779B9) % 2**32)
    torch.randn((1, 4096, 80), generator=generator)  # the flow's
    vocoder = stages.vocoder.stream(generator)
    sound = vocoder.sound(vocoder.excite(mel, last=True), last=True)
    assert decibels(synthesizer.watermarked(sound.numpy()), found) >= 60
    jumps = (mel[..., 1:] - mel[..., :-1]).square().mean(dim=(0, 1)).sqrt()
    borders = np.cumsum([piece.size(2) for piece in pieces])[:-1]
    assert len(borders) > 1
    for border in borders:
        assert jumps[border - 1] <= 1.2 * jumps.quantile(0.95)


def test_what_happens_between_two_chunks_changes_nothing(synthesizer: Synthesizer, early: list[Chunk]) -> None:
    found = []
    for chunk in generate_stream(synthesizer, TEXT, **EARLY):
        found.append(chunk)
        assert not torch.is_inference_mode_enabled(), "the caller's code is the caller's"
        torch.manual_seed(chunk.index)
        random.seed(chunk.index)
        if chunk.index == 1:
            synthesizer.synthesize("Another one.", seed=2, max_new_tokens=6)
    assert tokens_of(found) == tokens_of(early)
    assert np.array_equal(samples_of(found), samples_of(early))


def test_closing_a_stream_ends_the_work(
    synthesizer: Synthesizer, speech: Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_by(bound(synthesizer.model).speech_tokens, monkeypatch)
    blocks = synthesizer.token_blocks(TEXT, max_new_tokens=COUNT)
    monkeypatch.setattr(synthesizer, "token_blocks", lambda *_, **__: blocks)
    stream = generate_stream(synthesizer, TEXT, **EARLY)
    next(stream)
    before = drawn()
    assert before < COUNT - 1
    stream.close()
    assert drawn() == before
    assert list(stream) == []
    assert list(blocks) == [], "T3's caches are free"
    monkeypatch.undo()
    again = synthesizer.synthesize(TEXT, seed=7, max_new_tokens=COUNT)
    assert again.pcm_sha256 == speech.pcm_sha256


@pytest.mark.parametrize("look_ahead", [None, 3])
def test_a_stream_that_is_told_to_stop_stops_before_the_first_chunk(
    synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch, look_ahead: int | None
) -> None:
    drawn = drawn_by(bound(synthesizer.model).speech_tokens, monkeypatch)
    stream = generate_stream(
        synthesizer, TEXT, seed=7, max_new_tokens=COUNT, look_ahead=look_ahead, stopped=lambda: drawn() >= 4
    )
    assert list(stream) == []
    assert drawn() == 4


def test_a_stream_that_is_told_to_stop_stops_between_chunks(synthesizer: Synthesizer) -> None:
    gone = threading.Event()
    stream = generate_stream(synthesizer, TEXT, **EARLY, stopped=gone.is_set)
    assert not next(stream).is_last
    gone.set()
    assert list(stream) == []


def test_all_of_a_stream_carries_the_watermark(synthesizer: Synthesizer, early: list[Chunk]) -> None:
    watermarker, rate = synthesizer.model.watermarker, synthesizer.model.sr
    exact = list(generate_stream(synthesizer, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=9))
    for chunks in (exact, early):
        samples = samples_of(chunks)
        assert watermarker.get_watermark(samples, sample_rate=rate, round=False).mean() > 0.9
        for begin in range(0, len(samples) - 12_000, 12_000):
            part = watermarker.get_watermark(samples[begin : begin + 12_000], sample_rate=rate, round=False)
            assert part.mean() > 0.5, f"half a second from sample {begin} on"


def test_the_watermark_of_windows_is_that_of_the_whole(synthesizer: Synthesizer) -> None:
    generator = np.random.default_rng(0)
    time = np.arange(240 * 150) / 24_000
    samples = (0.2 * np.sin(2 * np.pi * 180 * time) * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)
    samples += 0.02 * generator.standard_normal(len(samples)).astype(np.float32)
    stream = _Stream(synthesizer, synthesizer.voices[DEFAULT_VOICE], 25, None, lambda: False)
    windows = Windows(stream._watermarked, context=24)
    pieces = torch.split(torch.from_numpy(samples).view(-1, 240).T, [10, 60, 0, 50, 30], dim=1)
    found = torch.cat([windows(piece, last=number == 4) for number, piece in enumerate(pieces)]).numpy()
    whole = synthesizer.watermarked(samples)
    assert decibels(whole, samples) < 40, "a watermark is to be seen, or this says nothing"
    assert decibels(whole, found) >= 80


@pytest.mark.parametrize("sizes", [[40], [7, 1, 20, 0, 12], [1] * 40])
def test_windows_give_what_the_whole_gives(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(3, 2, 5, generator=generator)
    signal = torch.randn(1, 2, 40, generator=generator)

    def convolved(x: torch.Tensor) -> torch.Tensor:
        return functional.conv1d(x, kernel, padding=2)[0].T.reshape(-1)

    windows = Windows(convolved, context=2)
    pieces = torch.split(signal, sizes, dim=2)
    found = [windows(piece, last=number == len(sizes)) for number, piece in enumerate(pieces, start=1)]
    torch.testing.assert_close(torch.cat(found), convolved(signal))
    blind = Windows(convolved, context=1)
    found = [blind(piece, last=number == len(sizes)) for number, piece in enumerate(pieces, start=1)]
    assert torch.allclose(torch.cat(found), convolved(signal)) == (len(sizes) == 1), "the context is what makes it so"


def test_the_vocoder_in_pieces_gives_the_sound_of_the_whole(synthesizer: Synthesizer) -> None:
    vocoder = bound(synthesizer.model).vocoder
    mel = 2 * torch.randn(1, 80, 120, generator=torch.Generator().manual_seed(1)) - 5

    def sound(sizes: list[int]) -> Any:
        stream = vocoder.stream(torch.Generator().manual_seed(2))
        found = []
        for number, piece in enumerate(torch.split(mel, sizes, dim=2), start=1):
            last = number == len(sizes)
            found.append(stream.sound(stream.excite(piece, last=last), last=last))
        return torch.cat(found).numpy()

    whole = sound([120])
    assert whole.shape == (120 * SAMPLES_PER_FRAME,)
    assert not whole[:SAMPLES_PER_FRAME].any(), "S3Gen fades in after 20 ms of silence"
    assert whole[SAMPLES_PER_FRAME:].any()
    assert decibels(whole, sound([30, 1, 49, 40])) >= 80


def test_the_windows_of_the_vocoder_see_far_enough_and_no_further(synthesizer: Synthesizer) -> None:
    """Whatever the weights: what is no number spreads as far as anything has a part."""
    vocoder = bound(synthesizer.model).vocoder
    mel, source = torch.zeros(1, 80, 100), torch.zeros(1, 100 * SAMPLES_PER_FRAME)
    spoilt_mel, spoilt_source = mel.clone(), source.clone()
    spoilt_mel[..., 50] = torch.nan
    spoilt_source[:, 50 * SAMPLES_PER_FRAME : 51 * SAMPLES_PER_FRAME] = torch.nan

    def reach(found: torch.Tensor) -> float:
        """To how many frames on each side it spreads, the farther one."""
        places = found.isnan().nonzero()[:, 0] * 100 / found.numel()
        return max(50 - float(places[0]), float(places[-1]) - 50)

    with torch.inference_mode():
        assert reach(vocoder.pitch(spoilt_mel)[0]) == vocoder_module._PITCH_CONTEXT
        assert reach(vocoder.sound(spoilt_mel, source)) <= vocoder_module._TRUNK_CONTEXT + 1
        found = reach(vocoder.sound(mel, spoilt_source)) - 1
    assert vocoder_module._TRUNK_CONTEXT - 1 < found <= vocoder_module._TRUNK_CONTEXT


def test_the_pitch_goes_on_from_chunk_to_chunk(synthesizer: Synthesizer) -> None:
    """Random weights give no voiced frame, so the source is given a pitch here."""
    hift = synthesizer.model.s3gen.mel2wav
    pitch = 200 + 80 * torch.sin(torch.arange(120) / 9)[None]
    sizes = [40, 1, 49, 30]

    def source() -> Source:
        return Source(hift, torch.Generator().manual_seed(3))

    with torch.inference_mode():
        whole = source()(pitch)
        going_on = source()
        found = torch.cat([going_on(piece) for piece in torch.split(pitch, sizes, dim=1)], dim=1)
        anew = torch.cat([source()(piece) for piece in torch.split(pitch, sizes, dim=1)], dim=1)
    wave, found_wave, wave_anew = (x.numpy() - float(whole.mean()) for x in (whole, found, anew))
    assert decibels(wave, found_wave) >= 40
    assert decibels(wave, wave_anew) < 10, "or there is no phase to be seen"


@pytest.mark.parametrize("look_ahead", [None, 3])
def test_a_voice_with_a_frame_more_than_its_tokens_can_be_streamed(
    synthesizer: Synthesizer, look_ahead: int | None
) -> None:
    voice = detached(synthesizer.voices[DEFAULT_VOICE])
    voice.gen["prompt_feat"] = torch.cat([voice.gen["prompt_feat"], voice.gen["prompt_feat"][:, -1:]], dim=1)
    odd = Synthesizer(synthesizer.model, {DEFAULT_VOICE: voice})
    speech = odd.synthesize(TEXT, seed=7, max_new_tokens=COUNT)
    chunks = list(
        generate_stream(odd, TEXT, seed=7, max_new_tokens=COUNT, chunk_tokens=8, look_ahead=look_ahead),
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
        ({"voice": "nobody"}, "no voice"),
        ({"seed": -1}, "seed"),
        ({"chunk_tokens": 0}, "chunk of 0 tokens"),
        ({"look_ahead": 2}, "look ahead of 2 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_streamed_is_refused_at_the_call(
    synthesizer: Synthesizer, arguments: dict[str, Any], word: str
) -> None:
    with pytest.raises(BadInputError, match=word):
        generate_stream(synthesizer, **{"text": TEXT, **arguments})


@pytest.mark.parametrize("look_ahead", [None, 3])
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens_are_an_error(synthesizer: Synthesizer, count: int, look_ahead: int | None) -> None:
    with pytest.raises(ModelError, match="too few"):
        next(generate_stream(synthesizer, TEXT, seed=1, max_new_tokens=count, look_ahead=look_ahead))


def test_a_model_that_is_not_warm_does_not_stream_when_it_has_to_be(attached: Attached) -> None:
    """This start had no state, so that it missed everything."""
    with pytest.raises(NotWarmError, match=r"misses are .* in conditionals") as caught:
        generate_stream_with_warmup_check(attached, TEXT, policy="require")
    assert "bake a state" in caught.value.next_step
    required = replace(attached, prepared=replace(attached.prepared, policy="require"))
    with pytest.raises(NotWarmError):
        generate_stream_with_warmup_check(required, TEXT)
    with pytest.raises(BadInputError, match="no policy 'perhaps'"):
        generate_stream_with_warmup_check(attached, TEXT, policy="perhaps")


@pytest.mark.parametrize(("policy", "warns"), [("fallback", True), ("off", False), (None, False)])
def test_a_model_that_is_not_warm_streams_with_a_warning(
    attached: Attached, caplog: pytest.LogCaptureFixture, policy: str | None, *, warns: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        chunks = list(generate_stream_with_warmup_check(attached, TEXT, policy=policy, seed=1, max_new_tokens=8))
    assert chunks[-1].is_last
    assert ("the model is not warm" in caplog.text) == warns


def test_a_warm_model_streams_under_every_policy(attached: Attached, caplog: pytest.LogCaptureFixture) -> None:
    prepared = replace(attached.prepared, policy="require", metrics=WarmupMetrics())
    warm = Attached(synthesizer=attached.synthesizer, prepared=prepared)
    with caplog.at_level(logging.WARNING):
        chunks = list(generate_stream_with_warmup_check(warm, TEXT, seed=1, max_new_tokens=8))
    assert chunks[-1].is_last
    assert "not warm" not in caplog.text


def test_both_are_public() -> None:
    assert chatterbox_prewarm.generate_stream is generate_stream
    assert chatterbox_prewarm.generate_stream_with_warmup_check is generate_stream_with_warmup_check
