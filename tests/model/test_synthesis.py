"""Test that a synthesis equals upstream's and does not change the model or its voices."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.model import load
from chatterbox_prewarm.model.regions.region import COMMON_REGIONS
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.synthesis import Synthesizer, seed_everything
from chatterbox_prewarm.model.text import normalize_punctuation
from chatterbox_prewarm.model.voices import for_upstream, placeholder_voice
from chatterbox_prewarm.model.watermark import Watermark
from chatterbox_prewarm.system.limits import SAMPLING
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS
    from numpy.typing import NDArray

    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.start.attach import Attached

TEXT = "Hello, world."


def _upstream_generate(model: ChatterboxTTS, attached: Attached, seed: int, **arguments: Any) -> torch.Tensor:
    """Run upstream's own `generate` with a limit of 12 tokens."""
    inference = model.t3.inference
    model.t3.inference = lambda **given: inference(**{**given, "max_new_tokens": 12})
    model.conds = for_upstream(attached.synthesizer.voices[DEFAULT_VOICE])
    seed_everything(seed)
    try:
        sound: torch.Tensor = model.generate(TEXT, **arguments)
        return sound
    finally:
        del model.t3.inference
        model.conds = None


def decibels(signal: Any, other: Any) -> float:
    """Return the energy of a signal relative to the energy of its difference from `other`, in dB."""
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(signal - other).sum(), 1e-30)))


@pytest.mark.parametrize("settings", [{}, {"cfg_weight": 0.7, "temperature": 0.5}, {"exaggeration": 1.0}])
def test_audio_equals_that_of_upstream(attached: Attached, upstream: ChatterboxTTS, settings: dict[str, float]) -> None:
    theirs = _upstream_generate(upstream, attached, 7, **settings).squeeze(0).numpy()
    ours = attached.synthesizer.synthesize(TEXT, seed=7, max_new_tokens=12, sampling=Sampling(**settings))
    assert ours.sample_rate == 24_000
    assert len(ours.samples) > 5_000
    assert ours.samples.shape == theirs.shape
    assert decibels(theirs, ours.samples) >= 50


def test_invisible_characters_do_not_change_the_speech(attached: Attached) -> None:
    texts = (TEXT, "\ufeffHel\u00adlo,\fwor\u200bld.")
    plain, marked = (attached.synthesizer.synthesize(text, seed=7, max_new_tokens=12).samples for text in texts)
    assert np.array_equal(plain, marked)


_UPSTREAM = """
import sys, warnings
warnings.simplefilter("ignore")
import chatterbox.tts as tts
import numpy as np
from chatterbox_prewarm.model import upstream
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.regions.vocoder import Vocoder
from chatterbox_prewarm.model.synthesis import Synthesizer, seed_everything
from chatterbox_prewarm.weights.variants import ENGLISH
make = tts.S3Gen
def s3gen():
    model = make()
    upstream.shorten_s3gen(model, 2)
    return model
tts.T3, tts.S3Gen = lambda: upstream.make_t3(ENGLISH, 2), s3gen
model = tts.ChatterboxTTS.from_local(sys.argv[1], "cpu")
inference = model.t3.inference
model.t3.inference = lambda **given: inference(**{**given, "max_new_tokens": 12})
seed_everything(7)
samples = model.generate("Hello, world.").squeeze(0).numpy()
assert "torch._dynamo" in sys.modules, "imported normally"
np.save(sys.argv[2], samples)
"""


@pytest.mark.slow
def test_audio_equals_that_of_upstream_imported_and_loaded_normally(
    attached: Attached, upstream: ChatterboxTTS, mini: Path, tmp_path: Path
) -> None:
    """The skipped imports and the mapped weights do not change the audio audibly.

    It is not equal bit by bit: on some processors, kernels round differently for weights at other addresses modulo 64.
    """
    file = tmp_path / "samples.npy"
    normal = subprocess.run(
        [sys.executable, "-c", _UPSTREAM, str(mini), str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert normal.returncode == 0, normal.stderr
    theirs = np.load(file)
    here = _upstream_generate(upstream, attached, 7).squeeze(0).numpy()
    assert len(theirs) > 5_000
    assert here.shape == theirs.shape
    assert decibels(theirs, here) >= 80


def test_seed_makes_the_audio_reproducible(attached: Attached) -> None:
    speak = attached.synthesizer.synthesize
    first, repeated, other = (speak(TEXT, seed=seed, max_new_tokens=12) for seed in (1, 1, 2))
    assert first.pcm_sha256 == repeated.pcm_sha256
    assert first.tokens_sha256 != other.tokens_sha256


def test_guidance_can_be_switched_off(attached: Attached) -> None:
    """Upstream's `generate` crashes with this setting."""
    speech = attached.synthesizer.synthesize(TEXT, seed=1, max_new_tokens=12, sampling=Sampling(cfg_weight=0.0))
    assert np.isfinite(speech.samples).all()
    assert len(speech.tokens) <= 12


@pytest.mark.parametrize(("setting", "limits"), [(name, SAMPLING[name]) for name in ENGLISH.controls])
def test_each_setting_can_be_at_its_limits(attached: Attached, setting: str, limits: tuple[float, float]) -> None:
    for value in limits:
        speech = attached.synthesizer.synthesize(TEXT, seed=1, max_new_tokens=6, sampling=Sampling(**{setting: value}))
        assert np.isfinite(speech.samples).all()
        assert len(speech.samples) > 0


def test_synthesis_does_not_change_the_voice(attached: Attached) -> None:
    voice = attached.synthesizer.voices[DEFAULT_VOICE]
    before = {key: value.clone() for key, value in voice.gen.items() if torch.is_tensor(value)}
    attached.synthesizer.synthesize(TEXT, seed=1, max_new_tokens=6)
    for key, value in before.items():
        assert voice.gen[key].dtype == value.dtype, key
        assert torch.equal(voice.gen[key], value), key


def test_speech_has_the_watermark(attached: Attached, upstream: ChatterboxTTS) -> None:
    speech = attached.synthesizer.synthesize(TEXT, seed=1, max_new_tokens=50)
    found = upstream.watermarker.get_watermark(speech.samples, sample_rate=speech.sample_rate)
    assert found.mean() > 0.5


@pytest.mark.parametrize("seconds", [0.4, 1.0, 3.21, 30.0])
def test_the_watermark_equals_that_of_upstream(attached: Attached, upstream: ChatterboxTTS, seconds: float) -> None:
    time = np.arange(int(seconds * 24_000)) / 24_000
    noise = np.random.default_rng(0).normal(size=time.size)
    samples = (0.3 * np.sin(2 * np.pi * 200 * time) + 0.01 * noise).astype(np.float32)
    theirs = np.asarray(upstream.watermarker.apply_watermark(samples, sample_rate=24_000))
    assert np.array_equal(attached.synthesizer.model.marked(samples), theirs)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "",
        "wait...what",
        "a  tab\tand   spaces ",
        "lower: case; with — dashes \N{EN DASH} and “quotes” or \u2018these\u2019",
        "Ends with a comma ,",
        "…",
        "ß is lower",
        "1. A list - of things:  more",
        "Question?",
        "ends with a dash-",
        "Ünïcödé 漢字",
    ],
)
def test_text_tokens_equal_those_of_upstream(attached: Attached, upstream: ChatterboxTTS, text: str) -> None:
    from chatterbox.tts import punc_norm

    if text:
        assert normalize_punctuation(text) == punc_norm(text)
    ids = upstream.tokenizer.text_to_tokens(normalize_punctuation(text))
    assert attached.synthesizer.model.text_tokens(text)[0, 1:-1].tolist() == ids[0].tolist()


def test_the_check_of_a_start_runs_every_region_and_keeps_the_generators(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    positions: set[int] = set()

    def recording(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            called.append(region.name)
            if region.name == "t3_prefill":
                positions.add(inputs[0].size(1))
            return region.function(*weights, *inputs)

        return run

    mark = Watermark.apply

    def marked(*arguments: Any, **named: Any) -> NDArray[np.float32]:
        called.append("watermark")
        return mark(*arguments, **named)

    monkeypatch.setattr(Watermark, "apply", marked)
    synthesizer = Synthesizer(load(mini, executor=recording), {"nobody": placeholder_voice()})
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    synthesizer.check("nobody")
    assert torch.equal(torch.rand(3), expected)
    assert set(called) == {*COMMON_REGIONS, "watermark"}
    assert positions == {4}, "the check does not run the complete prompt"


@pytest.mark.parametrize(
    ("text", "voice", "word"),
    [("", DEFAULT_VOICE, "empty"), (TEXT, "unknown", "no voice"), ("a" * 100_000, DEFAULT_VOICE, "100001 tokens")],
)
def test_invalid_text_or_voice_is_refused(attached: Attached, text: str, voice: str, word: str) -> None:
    with pytest.raises(BadInputError, match=word):
        attached.synthesizer.synthesize(text, voice=voice)


@pytest.mark.parametrize("field", ["temperature", "cfg_weight", "exaggeration", "repetition_penalty", "min_p", "top_p"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), True, "warm"])
def test_sampling_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(BadInputError, match=field):
        Sampling(**{field: value})


def test_too_few_tokens_are_a_model_error(attached: Attached) -> None:
    with pytest.raises(ModelError, match="too few"):
        attached.synthesizer.synthesize(TEXT, seed=1, max_new_tokens=1)
