"""The regions are upstream's mathematics: tokens, mel spectrogram and sound, at any length, without a host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import fidelity
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.model.regions import t3, t3_blocks
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.pipeline import Bound, bound
from chatterbox_prewarm.model.regions.region import MOST_FRAMES, MOST_PLACES, REGIONS
from chatterbox_prewarm.model.regions.t3 import SpeechTokens
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS, Conditionals

    from chatterbox_prewarm.start.attach import Attached

GREEDY = Sampling(min_p=1.0)


@pytest.fixture(scope="module")
def model(attached: Attached) -> ChatterboxTTS:
    return attached.synthesizer.model


@pytest.fixture(scope="module")
def voice(attached: Attached) -> Conditionals:
    return attached.synthesizer.voices[DEFAULT_VOICE]


@pytest.fixture(scope="module")
def stages(model: ChatterboxTTS) -> Bound:
    return bound(model)


def text_tokens(model: ChatterboxTTS, text: str = "The quick brown fox jumps over the lazy dog.") -> torch.Tensor:
    tokens = model.tokenizer.text_to_tokens(text)
    tokens = torch.nn.functional.pad(tokens, (1, 0), value=model.t3.hp.start_text_token)
    padded: torch.Tensor = torch.nn.functional.pad(tokens, (0, 1), value=model.t3.hp.stop_text_token)
    return padded


def upstream_tokens(model: ChatterboxTTS, voice: Conditionals, sampling: Sampling, count: int) -> torch.Tensor:
    """Upstream's own loop, seeded."""
    torch.manual_seed(3)
    drawn: torch.Tensor = model.t3.inference(
        t3_cond=t3._copy(voice.t3),
        text_tokens=text_tokens(model).repeat(2, 1),
        max_new_tokens=count,
        temperature=sampling.temperature,
        cfg_weight=sampling.cfg_weight,
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )[0]
    return drawn


def our_tokens(decoder: SpeechTokens, model: ChatterboxTTS, voice: Conditionals, sampling: Sampling, count: int) -> Any:
    torch.manual_seed(3)
    return decoder(voice.t3, text_tokens(model), sampling=sampling, max_new_tokens=count)


def test_greedy_tokens_are_upstreams_for_220_tokens(model: ChatterboxTTS, voice: Conditionals, stages: Bound) -> None:
    """Long enough to need more places than are read at first."""
    theirs = upstream_tokens(model, voice, GREEDY, 220)
    ours = our_tokens(stages.speech_tokens, model, voice, GREEDY, 220)
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
def test_seeded_tokens_are_upstreams(
    model: ChatterboxTTS, voice: Conditionals, stages: Bound, sampling: Sampling
) -> None:
    """On a CPU more than the same distribution: one seed gives the very same draws."""
    theirs = upstream_tokens(model, voice, sampling, 60)
    ours = our_tokens(stages.speech_tokens, model, voice, sampling, 60)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("region", ["t3_sample", "t3_sample_nucleus"])
def test_draws_follow_the_distribution(region: str) -> None:
    """Chi-squared over 20,000 draws of a known distribution, which no generator's seed decides.

    With a plain `torch.multinomial` this fails on a CPU: a few draws in 20,000 give a token of probability 1e-22.
    """
    torch.manual_seed(0)
    vocabulary, width, count = 8194, 4, 20_000
    wanted = torch.tensor([0.5, 0.25, 0.125, 0.125])
    # A norm of ones leaves a vector of ones as it is, so the head's rows add up to the logits.
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


@pytest.mark.parametrize("look_every", [1, 7, 1000])
def test_what_is_drawn_past_the_end_is_dropped(
    model: ChatterboxTTS, voice: Conditionals, monkeypatch: pytest.MonkeyPatch, look_every: int
) -> None:
    head = model.t3.speech_head
    kept = head.weight
    try:
        # Make the seventh greedy token the stop token.
        free = our_tokens(SpeechTokens(model.t3, eager), model, voice, GREEDY, 12)
        changed = kept.detach().clone()
        changed[[model.t3.hp.stop_speech_token, int(free[6])]] = changed[[int(free[6]), model.t3.hp.stop_speech_token]]
        head.weight = torch.nn.Parameter(changed)
        theirs = upstream_tokens(model, voice, GREEDY, 12)
        monkeypatch.setattr(t3, "_LOOK_EVERY_ON_CPU", look_every)
        ours = our_tokens(SpeechTokens(model.t3, eager), model, voice, GREEDY, 12)
    finally:
        head.weight = kept
    assert theirs[-1] == model.t3.hp.stop_speech_token
    assert len(theirs) == 7
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_text_longer_than_the_cache_is_refused(model: ChatterboxTTS, voice: Conditionals, stages: Bound) -> None:
    with pytest.raises(BadInputError, match=f"more than the {MOST_PLACES} there are") as caught:
        stages.speech_tokens(voice.t3, text_tokens(model), sampling=GREEDY, max_new_tokens=MOST_PLACES)
    assert "split the text" in caught.value.next_step


def test_speech_longer_than_the_flow_takes_is_refused(voice: Conditionals, stages: Bound) -> None:
    with pytest.raises(BadInputError, match=f"more than the {MOST_FRAMES} that one utterance may have") as caught:
        stages.flow(torch.zeros(MOST_FRAMES // 2, dtype=torch.int64), voice.gen)
    assert "split the text" in caught.value.next_step


@pytest.mark.parametrize(
    ("places", "dtype", "bound"), [(2, torch.float32, 1e-4), (387, torch.float32, 1e-4), (387, torch.bfloat16, 0.004)]
)
@pytest.mark.parametrize("peak", [1.0, 6.0])
def test_the_attention_of_a_gpu_is_that_of_a_cpu(places: int, dtype: torch.dtype, bound: float, peak: float) -> None:
    """The one is chosen by the device, so here it is called by itself; as near as one rounding of the result."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, n, 64, generator=generator).to(dtype) for n in (1, places, places))
    q, k = q * peak, k * peak
    seen = torch.arange(places)[None, None, None, :] <= places // 2
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)
    found = t3_blocks._attend(q, k, v, attn_mask=seen)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def test_t3_can_compute_in_bfloat16_and_s3gen_does_not(
    model: ChatterboxTTS, voice: Conditionals, stages: Bound
) -> None:
    decoder = SpeechTokens(model.t3, eager, dtype=torch.bfloat16)
    with torch.inference_mode():
        wide = stages.speech_tokens._prompt(voice.t3, text_tokens(model), 0.5)
        narrow = decoder._prompt(voice.t3, text_tokens(model), 0.5)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    outputs = []
    for prefill, x, cosine, sine in (
        (stages.speech_tokens._prefill[0], wide, stages.speech_tokens._cosine, stages.speech_tokens._sine),
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


def test_a_start_in_bfloat16_keeps_the_rotary_embedding_exact(mini: Path, stages: Bound, tmp_path: Path) -> None:
    execution = Execution(t3_dtype="bfloat16")
    narrow = attach(prepare(tmp_path, mini, cache=tmp_path / "cache", policy="off", execution=execution))
    decoder = bound(narrow.synthesizer.model).speech_tokens
    assert decoder.dtype == torch.bfloat16
    assert {weight.dtype for weight in narrow.synthesizer.model.t3.tfmr.layers.parameters()} == {torch.bfloat16}
    assert (decoder._cosine.float() - stages.speech_tokens._cosine).abs().max() <= 2**-8, "rounded once, at the end"
    speech = narrow.synthesizer.synthesize("Hello, world.", seed=1, max_new_tokens=12)
    assert len(speech.samples) > 0


@pytest.mark.parametrize("count", [3, 12, 61])
def test_the_mel_spectrogram_is_upstreams(model: ChatterboxTTS, voice: Conditionals, stages: Bound, count: int) -> None:
    tokens = torch.arange(count) * 97 % 6561
    torch.manual_seed(5)
    theirs = model.s3gen.flow_inference(tokens[None], ref_dict=dict(voice.gen), finalize=True)
    torch.manual_seed(5)
    ours = stages.flow(tokens, voice.gen)
    assert ours.shape == theirs.shape == (1, 80, 2 * count)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("count", [3, 12, 61])
def test_the_sound_is_upstreams(model: ChatterboxTTS, voice: Conditionals, stages: Bound, count: int) -> None:
    mel = stages.flow(torch.arange(count) * 89 % 6561, voice.gen)
    torch.manual_seed(6)
    theirs = model.s3gen.hift_inference(mel)[0].clone()
    theirs[:, : len(model.s3gen.trim_fade)] *= model.s3gen.trim_fade
    torch.manual_seed(6)
    ours = stages.vocoder(mel)
    assert ours.shape == (960 * count,)
    assert signal_to_noise(theirs[0], ours) >= 50


def signal_to_noise(signal: torch.Tensor, other: torch.Tensor) -> float:
    """In dB."""
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


def test_the_comparison_with_upstream_sees_what_differs(attached: Attached, model: ChatterboxTTS) -> None:
    text = "Hello, world."
    synthesizer = attached.synthesizer
    voice = synthesizer.voices[DEFAULT_VOICE]
    upstreams = fidelity.reference(model, voice, text)
    assert voice.t3.cond_prompt_speech_emb is None, "upstream changes the voice it is given; this is everyone's"
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
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


#: What makes a GPU's queue wait for the host, or the other way round.
SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")


def syncs(names: list[str]) -> list[str]:
    return [name for name in names if any(sync in name for sync in SYNCS)]


def test_the_hot_path_does_not_wait_for_the_host(
    model: ChatterboxTTS, voice: Conditionals, stages: Bound, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Operations() as flow:
        mel = stages.flow(torch.arange(12), voice.gen)
    with Operations() as vocoder:
        stages.vocoder(mel)
    assert len(flow.names) > 100
    assert syncs(flow.names) == []
    assert len(vocoder.names) > 100
    assert syncs(vocoder.names) == []
    with Operations() as upstreams:
        model.s3gen.flow_inference(torch.arange(12)[None], ref_dict=dict(voice.gen), finalize=True)
    assert syncs(upstreams.names), "upstream has many, or this test sees nothing"
    monkeypatch.setattr(t3, "_LOOK_EVERY_ON_CPU", 8)
    counts = []
    for count in (8, 16):
        with Operations() as decoding:
            our_tokens(stages.speech_tokens, model, voice, GREEDY, count)
        counts.append(len(syncs(decoding.names)))
    assert counts[1] - counts[0] <= 1, "one look at the end of speech more, and nothing by the token"


def test_weight_norms_are_not_computed_while_speaking(model: ChatterboxTTS, voice: Conditionals, stages: Bound) -> None:
    mel = stages.flow(torch.arange(12), voice.gen)
    with Operations() as ours:
        stages.vocoder(mel)
    with Operations() as theirs:
        model.s3gen.hift_inference(mel)
    assert [name for name in ours.names if "weight_norm" in name] == []
    assert len([name for name in theirs.names if "weight_norm" in name]) > 70
