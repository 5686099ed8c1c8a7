"""Test voice conversion against upstream's `ChatterboxVC`: tokens, audio, long speech, streams, bad input."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.conditionals import Conditionals
from chatterbox_prewarm.model.conversion import Converter, load_converter, part_lengths
from chatterbox_prewarm.model.model import Model, load
from chatterbox_prewarm.model.reference_clip import reference_audio
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.resampling import resampled
from chatterbox_prewarm.model.speech_tokenizer import SpeechTokenizer, slaney_filters
from chatterbox_prewarm.model.synthesis import Synthesizer, seed_everything
from chatterbox_prewarm.model.upstream import load_upstream
from chatterbox_prewarm.model.upstream_source import Behaviour
from chatterbox_prewarm.model.voices import for_upstream, read_builtin_voice
from chatterbox_prewarm.start.pretrained_vc import PrewarmedVC
from chatterbox_prewarm.start.save import save_warmup_cache
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from chatterbox_prewarm.model.chunk import Chunk

pytestmark = pytest.mark.slow

RATE = 24_000
#: How far the difference from upstream must be below the audio. It is due to rounding.
_LEAST_DECIBELS = 100
#: The same for a stream, whose windows round differently, also for a text.
_LEAST_DECIBELS_OF_A_STREAM = 80
_LAST_LAYER = "tokenizer.quantizer._codebook.project_down"


def speech(seconds: float, rate: int = RATE) -> NDArray[np.float32]:
    """Generate speech-like sound whose timbre changes, so that its tokens do."""
    samples = reference_audio(seconds, rate)
    time = np.arange(samples.size) / rate
    noise = np.random.default_rng(1).normal(0.0, 0.1, samples.size) * (np.sin(2 * np.pi * 1.3 * time) > 0.4)
    changing: NDArray[np.float64] = samples * (0.6 + 0.4 * np.sin(2 * np.pi * 0.31 * time)) + noise
    return changing.astype(np.float32)


@pytest.fixture(scope="module")
def weights(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a mini checkpoint whose speech tokenizer uses all levels.

    With random weights, its tokens hardly depend on the sound: its last layer is changed so that each of the eight
    dimensions has a mean of 0 and a deviation of 1.
    """
    directory = tmp_path_factory.mktemp("conversion") / "weights"
    shutil.copytree(mini, directory, copy_function=os.link)
    tensors = load_file(directory / ENGLISH.s3gen)
    tokenizer = SpeechTokenizer(NamedTensors(tensors, "tokenizer."))
    weight = tensors[f"{_LAST_LAYER}.weight"]
    with torch.inference_mode():
        hidden = tokenizer._encode(tokenizer.log_mel(torch.from_numpy(speech(12.0, 16_000)))[None])[0]
        mean, deviation = (hidden @ weight.T).mean(dim=0), (hidden @ weight.T).std(dim=0)
        tensors[f"{_LAST_LAYER}.weight"] = weight / deviation[:, None]
        tensors[f"{_LAST_LAYER}.bias"] = -mean / deviation
    (directory / ENGLISH.s3gen).unlink()
    save_file(tensors, directory / ENGLISH.s3gen)
    return directory


@pytest.fixture(scope="module")
def model(weights: Path) -> Model:
    return load(weights)


@pytest.fixture(scope="module")
def converter(model: Model, weights: Path) -> Converter:
    return load_converter(model, weights)


@pytest.fixture(scope="module")
def voice(weights: Path) -> Conditionals:
    found = read_builtin_voice(weights)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def upstream(weights: Path, model: Model, voice: Conditionals) -> Any:
    """Load upstream's `ChatterboxVC`. Its tokenizer is read from the file, and not shared with ours."""
    s3gen = load_upstream(weights, lean=model).s3gen
    from chatterbox.vc import ChatterboxVC

    return ChatterboxVC(s3gen, "cpu", for_upstream(voice).gen)


def decibels(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Return how far the difference is below the audio."""
    assert ours.shape == theirs.shape
    return float(10 * np.log10(np.square(theirs).sum() / max(np.square(ours - theirs).sum(), 1e-30)))


def tokens_of(tokenizer: SpeechTokenizer, samples: NDArray[np.float32], rate: int) -> list[int]:
    return tokenizer(torch.from_numpy(resampled(samples, rate, 16_000))).tolist()


def upstream_tokens(upstream: Any, samples: NDArray[np.float32], rate: int) -> list[int]:
    import librosa

    audio = librosa.resample(samples, orig_sr=rate, target_sr=16_000)
    found: list[int] = upstream.s3gen.tokenizer(torch.from_numpy(audio)[None])[0][0].tolist()
    return found


@pytest.mark.parametrize(
    ("seconds", "rate", "count"),
    [(0.5, 24_000, 13), (5.0, 44_100, 125), (12.0, 16_000, 300), (40.0, 48_000, 1000)],
)
def test_tokens_equal_those_of_upstream(
    seconds: float, rate: int, count: int, converter: Converter, upstream: Any
) -> None:
    samples = speech(seconds, rate)
    ours = tokens_of(converter._tokenizer, samples, rate)
    assert ours == upstream_tokens(upstream, samples, rate)
    assert len(ours) == count
    assert len(set(ours)) > count / 4, "the tokens depend on the sound"


def test_speech_whose_last_window_is_short_is_complete(converter: Converter, upstream: Any) -> None:
    samples = speech(53.0, 16_000)
    ours, theirs = tokens_of(converter._tokenizer, samples, 16_000), upstream_tokens(upstream, samples, 16_000)
    assert (len(ours), len(theirs)) == (1325, 1275), "upstream loses 2 s"
    assert ours[:1275] == theirs


def test_the_comparison_notices_a_weight_of_the_tokenizer_that_is_scaled(weights: Path, upstream: Any) -> None:
    tensors = load_file(weights / ENGLISH.s3gen)
    tensors[f"{_LAST_LAYER}.weight"] *= 1.01
    changed = SpeechTokenizer(NamedTensors(tensors, "tokenizer."))
    samples = speech(12.0, 16_000)
    assert tokens_of(changed, samples, 16_000) != upstream_tokens(upstream, samples, 16_000)


def test_constants_that_a_checkpoint_lacks_are_computed(weights: Path) -> None:
    tensors = load_file(weights / ENGLISH.s3gen)
    assert np.array_equal(slaney_filters(), tensors["tokenizer._mel_filters"].numpy())
    named = NamedTensors(tensors, "tokenizer.")
    given = SpeechTokenizer(named, mel_filters=tensors["tokenizer._mel_filters"], window=tensors["tokenizer.window"])
    samples = torch.from_numpy(speech(1.0, 16_000))
    assert torch.equal(SpeechTokenizer(named).log_mel(samples), given.log_mel(samples))


def test_a_synthesis_maps_no_tensor_of_the_tokenizer(model: Model) -> None:
    assert not [name for name in model.tensors if "tokenizer" in name]


def both(
    seconds: float, converter: Converter, upstream: Any, voice: Conditionals, path: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Convert speech with ours and with upstream's public method."""
    samples = speech(seconds)
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    upstream.ref_dict = for_upstream(voice).gen
    seed_everything(7)
    theirs = upstream.generate(path).squeeze(0).numpy()
    return converter.convert(samples, RATE, voice, seed=7).samples, theirs


def recorded(
    function: Callable[..., NDArray[np.float32]], plain: list[NDArray[np.float32]]
) -> Callable[..., NDArray[np.float32]]:
    """Keep what a watermark is added to."""

    def call(samples: NDArray[np.float32], *, sample_rate: int) -> NDArray[np.float32]:
        plain.append(samples.copy())
        return function(samples, sample_rate=sample_rate)

    return call


@pytest.mark.parametrize("seconds", [0.5, 12.0])
def test_audio_equals_that_of_upstream_before_and_after_the_watermark(
    seconds: float,
    converter: Converter,
    upstream: Any,
    voice: Conditionals,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    plain: list[NDArray[np.float32]] = []
    watermarks = ((upstream.watermarker, "apply_watermark"), (converter._synthesizer.model.watermark, "apply"))
    for watermark, name in watermarks:
        monkeypatch.setattr(watermark, name, recorded(getattr(watermark, name), plain))
    ours, theirs = both(seconds, converter, upstream, voice, tmp_path / "speech.wav")
    assert decibels(ours, theirs) >= _LEAST_DECIBELS
    assert decibels(plain[1], plain[0]) >= _LEAST_DECIBELS


def test_the_comparison_notices_a_weight_of_the_flow_that_is_scaled(
    model: Model, converter: Converter, upstream: Any, voice: Conditionals, tmp_path: Path
) -> None:
    name = "s3gen.flow.decoder.estimator.final_proj.weight"
    scaled = {**model.tensors, name: model.tensors[name] * 1.01}
    changed = replace(model, tensors=scaled, flow=Flow(NamedTensors(scaled, "s3gen.flow."), eager))
    ours, theirs = both(0.5, Converter(changed, converter._tokenizer), upstream, voice, tmp_path / "speech.wav")
    assert decibels(ours, theirs) < _LEAST_DECIBELS


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_ten_seconds_become_ten_seconds(rate: int, converter: Converter, voice: Conditionals) -> None:
    converted = converter.convert(speech(10.0, rate), rate, voice, seed=1)
    assert abs(len(converted.samples) - 10 * RATE) <= 480
    assert not converted.is_truncated


def test_the_last_token_is_heard_where_upstream_leaves_it_out_of_spoken_texts(
    model: Model, converter: Converter, voice: Conditionals
) -> None:
    main = replace(model, behaviour=Behaviour(repetition_penalty=1.2, dropped_tokens=1))
    converted = Converter(main, converter._tokenizer).convert(speech(1.0), RATE, voice, seed=1)
    assert len(converted.samples) == RATE


def test_upstream_finds_the_watermark(converter: Converter, upstream: Any, voice: Conditionals) -> None:
    converted = converter.convert(speech(5.0), RATE, voice, seed=1)
    assert upstream.watermarker.get_watermark(converted.samples, sample_rate=RATE, round=False).mean() > 0.9
    assert upstream.watermarker.get_watermark(speech(5.0), sample_rate=RATE, round=False).mean() < 0.5


def samples_of(chunks: list[Chunk]) -> NDArray[np.float32]:
    return np.concatenate([chunk.samples for chunk in chunks])


def test_a_stream_equals_the_audio(converter: Converter, voice: Conditionals) -> None:
    ours = converter.convert(speech(2.1), RATE, voice, seed=7)
    chunks = list(converter.stream(speech(2.1), RATE, voice, seed=7, chunk_tokens=20))
    assert decibels(samples_of(chunks), ours.samples) >= _LEAST_DECIBELS_OF_A_STREAM
    assert np.concatenate([chunk.tokens for chunk in chunks]).tolist() == ours.tokens.tolist()
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    assert [chunk.is_last for chunk in chunks] == [False, False, True]
    assert not any(chunk.is_truncated for chunk in chunks)


def test_a_stream_that_looks_ahead_has_the_length_of_the_speech(converter: Converter, voice: Conditionals) -> None:
    chunks = list(converter.stream(speech(2.1), RATE, voice, seed=7, look_ahead=3))
    assert samples_of(chunks).size == 53 * 960
    tokens = np.concatenate([chunk.tokens for chunk in chunks]).tolist()
    assert tokens == tokens_of(converter._tokenizer, speech(2.1), RATE)
    assert chunks[-1].is_last


def test_a_stopped_stream_ends(converter: Converter, voice: Conditionals) -> None:
    gone = False
    chunks = converter.stream(speech(3.0), RATE, voice, seed=7, stopped=lambda: gone)
    assert not next(chunks).is_last
    gone = True
    assert list(chunks) == []


def test_long_speech_is_cut_at_quiet_places(
    converter: Converter, voice: Conditionals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts of at most 2 s instead of 40 s, which the CPU computes sooner."""
    monkeypatch.setattr("chatterbox_prewarm.model.conversion._PART_TOKENS", 50)
    samples, pauses = speech(4.4), (1.6, 3.0)
    for pause in pauses:
        samples[int((pause - 0.1) * RATE) : int((pause + 0.1) * RATE)] = 0
    lengths = [part.numel() for part in converter._parts(resampled(samples, RATE, 16_000), 50, lambda: False)]
    assert len(lengths) == 3
    assert sum(lengths) == 110
    assert np.abs(np.cumsum(lengths)[:2] * 0.04 - pauses).max() < 0.1
    assert len(converter.convert(samples, RATE, voice, seed=7).samples) == 110 * 960
    frames = voice.gen["prompt_feat"]
    surplus = Conditionals(t3=voice.t3, gen={**voice.gen, "prompt_feat": torch.cat([frames, frames[:, -1:]], dim=1)})
    ours = converter.convert(samples, RATE, surplus, seed=7)
    assert len(ours.samples) == 110 * 960 - 480, "only the first part lacks a frame, as in upstream"
    chunks = list(converter.stream(samples, RATE, surplus, seed=7, chunk_tokens=30))
    assert decibels(samples_of(chunks), ours.samples) >= _LEAST_DECIBELS_OF_A_STREAM
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_conversion_can_be_stopped_between_two_windows_of_the_tokenizer(converter: Converter) -> None:
    answers = iter([False, True])  # a third question would be an error
    assert converter._parts(speech(70.0, 16_000), 1000, lambda: next(answers)) == []


@pytest.mark.parametrize("limit", [250, 1000])
@pytest.mark.parametrize("tokens", [1, 250, 251, 1000, 1001, 1024, 1026, 7500])
def test_no_part_is_longer_than_the_limit(tokens: int, limit: int) -> None:
    noise = np.random.default_rng(0).normal(size=tokens * 640 - 100).astype(np.float32)
    for samples in (noise, np.zeros_like(noise)):
        lengths = part_lengths(samples, tokens, limit)
        assert sum(lengths) == tokens
        assert max(lengths) <= limit
        assert len(lengths) == 1 or min(lengths) >= 25


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (speech(0.1), RATE, "is 0.10 s long"),
        (np.zeros(0, np.float32), RATE, "is 0.00 s long"),
        (np.ones(301 * 8_000, np.float32), 8_000, "is 301.00 s long"),
        (np.zeros(RATE, np.float32), RATE, "is silent"),
        (np.full(RATE, np.nan, np.float32), RATE, "NaN or infinity"),
        (np.full(RATE, -np.inf, np.float32), RATE, "NaN or infinity"),
        (speech(1.0) * 32768, RATE, "the full scale is 1"),
        (np.zeros((RATE, 2), np.float32), RATE, r"shape \(24000, 2\)"),
        (np.zeros(RATE, np.int16), RATE, "array of int16"),
        (speech(1.0), 4_000, "sampled at 4000 Hz"),
        (speech(1.0), 400_000, "sampled at 400000 Hz"),
    ],
)
def test_speech_that_cannot_be_converted_is_refused(
    samples: NDArray[np.float32], rate: int, message: str, converter: Converter, voice: Conditionals
) -> None:
    for call in (converter.convert, converter.stream):
        with pytest.raises(BadInputError, match=message) as caught:
            call(samples, rate, voice)
        assert caught.value.next_step


def test_the_shortest_speech_can_be_converted(converter: Converter, voice: Conditionals) -> None:
    assert len(converter.convert(speech(0.12), RATE, voice, seed=1).samples) == 0.12 * RATE


def test_bad_settings_of_a_stream_are_refused_at_the_call(converter: Converter, voice: Conditionals) -> None:
    for settings in ({"chunk_tokens": 0}, {"look_ahead": 2}, {"seed": -1}):
        with pytest.raises(BadInputError):
            converter.stream(speech(1.0), RATE, voice, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prewarmed(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> PrewarmedVC:
    return PrewarmedVC.from_pretrained_with_warmup("cpu", weights=weights, cache=tmp_path_factory.mktemp("cache"))


def test_the_python_class_gives_the_audio_of_upstream_with_the_builtin_voice_and_with_that_of_a_clip(
    prewarmed: PrewarmedVC, upstream: Any, voice: Conditionals, clip: Path, tmp_path: Path
) -> None:
    assert prewarmed.warmup_completed
    upstream.ref_dict = for_upstream(voice).gen
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(0.5), RATE, subtype="FLOAT")
    for target in (None, clip):
        audio = []
        for system in (prewarmed, upstream):
            seed_everything(7)
            audio.append(system.generate(path, target_voice_path=target))
        assert audio[0].shape == audio[1].shape
        assert decibels(audio[0][0].numpy(), audio[1][0].numpy()) >= _LEAST_DECIBELS
    assert prewarmed.ref_dict is not None
    assert prewarmed.ref_dict.keys() == upstream.ref_dict.keys()
    assert torch.equal(prewarmed.ref_dict["prompt_token"], upstream.ref_dict["prompt_token"])
    chunks = list(prewarmed.generate_stream(path, seed=7, chunk_tokens=5))
    seed_everything(7)
    whole = prewarmed.generate(path)[0].numpy()
    assert decibels(samples_of(chunks), whole) >= _LEAST_DECIBELS_OF_A_STREAM


def test_the_python_class_refuses_files_that_it_cannot_use(prewarmed: PrewarmedVC, clip: Path, tmp_path: Path) -> None:
    before = prewarmed.ref_dict
    (tmp_path / "text.wav").write_text("not audio")
    wrong: Any
    for wrong, problem in (
        (tmp_path / "text.wav", "is not audio that can be read"),
        (tmp_path / "missing.wav", "does not exist"),
        (tmp_path, "does not exist"),
        (b"RIFF", "does not exist"),
        (None, "does not exist"),
    ):
        with pytest.raises(BadInputError, match=f"the speech .* {problem}"):
            prewarmed.generate(wrong, target_voice_path=clip)
        with pytest.raises(BadInputError, match=f"the clip .* {problem}"):
            prewarmed.set_target_voice(wrong)
    for arguments in ({"seed": -1}, {"chunk_tokens": 0}, {"look_ahead": -1}):
        with pytest.raises(BadInputError):
            prewarmed.generate_stream(clip, target_voice_path=clip, **arguments)
    assert prewarmed.ref_dict is before, "a refused call does not change the target"


def test_a_model_that_converts_speaks_no_texts_and_saves_no_state(prewarmed: PrewarmedVC, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="speaks no texts"):
        prewarmed.attached.synthesizer.synthesize("Hello.")
    with pytest.raises(BadInputError, match="cannot make a warm state"):
        save_warmup_cache(prewarmed, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_without_a_target_voice_a_conversion_is_refused(
    prewarmed: PrewarmedVC, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prewarmed, "ref_dict", None)
    with pytest.raises(BadInputError, match="no target voice"):
        prewarmed.generate(clip)


def test_a_conversion_leaves_the_model_usable(model: Model, converter: Converter, voice: Conditionals) -> None:
    synthesizer = Synthesizer(model, {"default": voice})
    before = synthesizer.synthesize("Hello.", seed=7, max_new_tokens=6).pcm_sha256
    one, two = (converter.convert(speech(0.5), RATE, voice, seed=3).pcm_sha256 for _ in range(2))
    assert one == two
    assert synthesizer.synthesize("Hello.", seed=7, max_new_tokens=6).pcm_sha256 == before
