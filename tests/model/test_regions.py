"""Test that the regions compute upstream's tokens, spectrogram and audio, at any length and without a host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatterbox_prewarm.bench import fidelity
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.model.regions import t3, t3_blocks
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.pipeline import Pipeline, pipeline_of
from chatterbox_prewarm.model.regions.region import MAX_FRAMES, MAX_POSITIONS, REGIONS
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.synthesis import text_tokens
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS, Conditionals

    from chatterbox_prewarm.start.attach import Attached

GREEDY = Sampling(min_p=1.0)
TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def model(attached: Attached) -> ChatterboxTTS:
    return attached.synthesizer.model


@pytest.fixture(scope="module")
def voice(attached: Attached) -> Conditionals:
    return attached.synthesizer.voices[DEFAULT_VOICE]


@pytest.fixture(scope="module")
def pipeline(model: ChatterboxTTS) -> Pipeline:
    return pipeline_of(model)


def upstream_tokens(model: ChatterboxTTS, voice: Conditionals, sampling: Sampling, count: int) -> torch.Tensor:
    """Draw tokens with upstream's own loop and a fixed seed."""
    torch.manual_seed(3)
    drawn: torch.Tensor = model.t3.inference(
        t3_cond=t3.copy_conditionals(voice.t3),
        text_tokens=text_tokens(model, TEXT).repeat(2, 1),
        max_new_tokens=count,
        temperature=sampling.temperature,
        cfg_weight=sampling.cfg_weight,
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )[0]
    return drawn


def our_tokens(decoder: T3Decoder, model: ChatterboxTTS, voice: Conditionals, sampling: Sampling, count: int) -> Any:
    torch.manual_seed(3)
    return decoder(voice.t3, text_tokens(model, TEXT), sampling=sampling, max_new_tokens=count)


def test_greedy_tokens_equal_those_of_upstream(model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline) -> None:
    """The sequence is long enough for attention to read more positions than at the beginning."""
    theirs = upstream_tokens(model, voice, GREEDY, 220)
    ours = our_tokens(pipeline.decoder, model, voice, GREEDY, 220)
    assert theirs.shape == (220,)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=1.0, cfg_weight=0.0, repetition_penalty=1.0, min_p=0.0),
        Sampling(temperature=0.5, cfg_weight=1.5, repetition_penalty=2.0),
        Sampling(top_p=0.6),
        Sampling(top_p=0.05, min_p=0.0),
        Sampling(temperature=3.0, top_p=0.95, min_p=0.2),
    ],
    ids=str,
)
def test_seeded_tokens_equal_those_of_upstream(
    model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline, sampling: Sampling
) -> None:
    """On a CPU, a seed gives exactly the tokens of upstream."""
    theirs = upstream_tokens(model, voice, sampling, 60)
    ours = our_tokens(pipeline.decoder, model, voice, sampling, 60)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("region", ["t3_sample", "t3_sample_nucleus"])
def test_draws_follow_the_distribution(region: str) -> None:
    """Test 20,000 draws from a known distribution with chi-squared. The result does not depend on the seed.

    A plain `torch.multinomial` fails this test on a CPU: a few of 20,000 draws give a token of probability 1e-22.
    """
    torch.manual_seed(0)
    vocabulary, width, count = 8194, 4, 20_000
    wanted = torch.tensor([0.5, 0.25, 0.125, 0.125])
    # The norm does not change a vector of ones, so the logits are the sums of the head's rows.
    norm, x = torch.ones(width), torch.ones(2, width)
    head = torch.full((vocabulary, width), -50.0 / width)
    head[:4] = wanted.log()[:, None] / width
    tables = torch.zeros(vocabulary, width), torch.zeros(4100, width)
    controls = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.9999])
    used, step = torch.zeros(vocabulary, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    seen = torch.zeros(4)
    for _ in range(count):
        noise = torch.empty(vocabulary).exponential_()
        token, _, _ = REGIONS[region].function(norm, head, *tables, x, controls, noise, used, step)
        seen[token] += 1
    statistic = float(((seen - count * wanted) ** 2 / (count * wanted)).sum())
    assert statistic < 16.27, "the 0.1 % point of chi-squared with three degrees of freedom"


@pytest.mark.parametrize("check_every", [1, 7, 1000])
def test_tokens_after_the_stop_token_are_dropped(
    model: ChatterboxTTS, voice: Conditionals, monkeypatch: pytest.MonkeyPatch, check_every: int
) -> None:
    head = model.t3.speech_head
    kept = head.weight
    try:
        # Make the seventh greedy token the stop token.
        free = our_tokens(T3Decoder(model.t3, eager), model, voice, GREEDY, 12)
        changed = kept.detach().clone()
        changed[[model.t3.hp.stop_speech_token, int(free[6])]] = changed[[int(free[6]), model.t3.hp.stop_speech_token]]
        head.weight = torch.nn.Parameter(changed)
        theirs = upstream_tokens(model, voice, GREEDY, 12)
        monkeypatch.setattr(t3, "_CHECK_EVERY_ON_CPU", check_every)
        ours = our_tokens(T3Decoder(model.t3, eager), model, voice, GREEDY, 12)
    finally:
        head.weight = kept
    assert theirs[-1] == model.t3.hp.stop_speech_token
    assert len(theirs) == 7
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_text_longer_than_the_kv_cache_is_refused(
    model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline
) -> None:
    with pytest.raises(BadInputError, match=f"the cache has at most {MAX_POSITIONS}") as caught:
        pipeline.decoder(voice.t3, text_tokens(model, TEXT), sampling=GREEDY, max_new_tokens=MAX_POSITIONS)
    assert "split the text" in caught.value.next_step


def test_speech_longer_than_the_limit_of_the_flow_is_refused(voice: Conditionals, pipeline: Pipeline) -> None:
    with pytest.raises(BadInputError, match=f"the limit is {MAX_FRAMES}") as caught:
        pipeline.flow(torch.zeros(MAX_FRAMES // 2, dtype=torch.int64), voice.gen)
    assert "split the text" in caught.value.next_step


@pytest.mark.parametrize(
    ("positions", "dtype", "tolerance"),
    [(2, torch.float32, 1e-4), (387, torch.float32, 1e-4), (387, torch.bfloat16, 0.004)],
)
@pytest.mark.parametrize("peak", [1.0, 6.0])
def test_gpu_attention_equals_cpu_attention(positions: int, dtype: torch.dtype, tolerance: float, peak: float) -> None:
    """The device selects the function, so this test calls it directly. The tolerance is one rounding of the result."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, n, 64, generator=generator).to(dtype) for n in (1, positions, positions))
    q, k = q * peak, k * peak
    seen = torch.arange(positions)[None, None, None, :] <= positions // 2
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)
    found = t3_blocks._attend(q, k, v, attn_mask=seen)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_t3_computes_in_bfloat16_and_s3gen_in_float32(
    model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline
) -> None:
    decoder = T3Decoder(model.t3, eager, dtype=torch.bfloat16)
    with torch.inference_mode():
        wide = pipeline.decoder._embed_prompt(voice.t3, text_tokens(model, TEXT), 0.5)
        narrow = decoder._embed_prompt(voice.t3, text_tokens(model, TEXT), 0.5)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    outputs = []
    for prefill, x, cosine, sine in (
        (pipeline.decoder._prefill[0], wide, pipeline.decoder._cosine, pipeline.decoder._sine),
        (decoder._prefill[0], narrow, decoder._cosine, decoder._sine),
    ):
        output, _, _ = prefill(x, cosine[: x.size(1)], sine[: x.size(1)])
        outputs.append(output.float())
    similarity = torch.nn.functional.cosine_similarity(outputs[0], outputs[1], dim=-1)
    assert similarity.min() > 0.999
    drawn = our_tokens(decoder, model, voice, GREEDY, 5)
    assert drawn.shape == (5,)
    assert ((drawn >= 0) & (drawn < 8194)).all()
    assert model.t3.speech_head.weight.dtype == torch.float32
    assert {weight.dtype for weight in model.s3gen.flow.parameters()} == {torch.float32}


def test_rotary_embedding_is_exact_in_bfloat16(mini: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    execution = Execution(t3_dtype="bfloat16")
    cache = tmp_path / "cache"
    options = StartOptions(warm=tmp_path, weights=mini, cache=cache, policy="off", execution=execution)
    narrow = attach(prepare(options))
    decoder = pipeline_of(narrow.synthesizer.model).decoder
    assert decoder.dtype == torch.bfloat16
    assert {weight.dtype for weight in narrow.synthesizer.model.t3.tfmr.layers.parameters()} == {torch.bfloat16}
    assert (decoder._cosine.float() - pipeline.decoder._cosine).abs().max() <= 2**-8, "rounded once, at the end"
    speech = narrow.synthesizer.synthesize("Hello, world.", seed=1, max_new_tokens=12)
    assert len(speech.samples) > 0


@pytest.mark.parametrize("count", [3, 12, 61])
def test_mel_spectrogram_equals_that_of_upstream(
    model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline, count: int
) -> None:
    tokens = torch.arange(count) * 97 % 6561
    torch.manual_seed(5)
    theirs = model.s3gen.flow_inference(tokens[None], ref_dict=dict(voice.gen), finalize=True)
    torch.manual_seed(5)
    ours = pipeline.flow(tokens, voice.gen)
    assert ours.shape == theirs.shape == (1, 80, 2 * count)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("count", [3, 12, 61])
def test_audio_equals_that_of_upstream(
    model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline, count: int
) -> None:
    mel = pipeline.flow(torch.arange(count) * 89 % 6561, voice.gen)
    torch.manual_seed(6)
    theirs = model.s3gen.hift_inference(mel)[0].clone()
    theirs[:, : len(model.s3gen.trim_fade)] *= model.s3gen.trim_fade
    torch.manual_seed(6)
    ours = pipeline.vocoder(mel)
    assert ours.shape == (960 * count,)
    assert signal_to_noise(theirs[0], ours) >= 50


def signal_to_noise(signal: torch.Tensor, other: torch.Tensor) -> float:
    """Return the ratio of signal to difference in dB."""
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


@pytest.mark.slow
def test_comparison_with_upstream_detects_differences(attached: Attached, model: ChatterboxTTS) -> None:
    text = "Hello, world."
    synthesizer = attached.synthesizer
    voice = synthesizer.voices[DEFAULT_VOICE]
    upstreams = fidelity.reference(model, voice, text)
    assert voice.t3.cond_prompt_speech_emb is None, (
        "upstream changes its voice argument, and other tests share this voice"
    )
    found = fidelity.compare(synthesizer, text, upstreams)
    assert found["greedy_tokens_equal"] == len(upstreams["tokens"]) == fidelity.TOKENS
    assert found["next_tokens_equal"] == 1.0
    assert found["mel_difference"] <= 1e-4
    assert found["sound_decibels"] >= 50
    other = {"tokens": upstreams["tokens"].clone(), "mel": upstreams["mel"] * 1.01, "sound": upstreams["sound"] * 1.01}
    other["tokens"][150] += 1
    found = fidelity.compare(synthesizer, text, other)
    assert found["greedy_tokens_equal"] == 150
    assert 0.5 < found["next_tokens_equal"] < 1.0
    assert found["mel_difference"] == pytest.approx(0.01, rel=0.1)


class Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


#: Operations for which the host waits for the GPU.
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")


def syncs(names: list[str]) -> list[str]:
    return [name for name in names if any(sync in name for sync in SYNCS)]


def test_hot_path_has_no_host_sync(
    model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Operations() as flow:
        mel = pipeline.flow(torch.arange(12), voice.gen)
    with Operations() as vocoder:
        pipeline.vocoder(mel)
    assert len(flow.names) > 100
    assert syncs(flow.names) == []
    assert len(vocoder.names) > 100
    assert syncs(vocoder.names) == []
    with Operations() as upstreams:
        model.s3gen.flow_inference(torch.arange(12)[None], ref_dict=dict(voice.gen), finalize=True)
    assert syncs(upstreams.names), "upstream has host syncs; otherwise this test detects nothing"
    monkeypatch.setattr(t3, "_CHECK_EVERY_ON_CPU", 8)
    counts = []
    for count in (8, 16):
        with Operations() as decoding:
            our_tokens(pipeline.decoder, model, voice, GREEDY, count)
        counts.append(len(syncs(decoding.names)))
    assert counts[1] - counts[0] <= 1, "one more check for the end of speech, and nothing per token"


def test_synthesis_does_not_compute_weight_norms(model: ChatterboxTTS, voice: Conditionals, pipeline: Pipeline) -> None:
    mel = pipeline.flow(torch.arange(12), voice.gen)
    with Operations() as ours:
        pipeline.vocoder(mel)
    with Operations() as theirs:
        model.s3gen.hift_inference(mel)
    assert [name for name in ours.names if "weight_norm" in name] == []
    assert len([name for name in theirs.names if "weight_norm" in name]) > 70
