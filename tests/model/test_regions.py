"""Test that the regions compute upstream's tokens, spectrogram and audio, at any length and without a host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatterbox_prewarm.bench import fidelity
from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.model import load
from chatterbox_prewarm.model.profiles import Execution
from chatterbox_prewarm.model.regions import decoder, flow, t3_blocks, t3_prompt, vocoder
from chatterbox_prewarm.model.regions.alignment import FREE
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.region import MAX_FRAMES, MAX_POSITIONS, REGIONS
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.synthesis import Synthesizer
from chatterbox_prewarm.model.tokenizer import LLAMA_FRAME, MAX_TEXT_TOKENS
from chatterbox_prewarm.model.upstream import upstream_text_tokens
from chatterbox_prewarm.model.voices import for_upstream, read_builtin_voice
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.model import Model
    from chatterbox_prewarm.model.regions.decoder import TokenDecoder
    from chatterbox_prewarm.start.attach import Attached

GREEDY = Sampling(min_p=1.0)
TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def model(attached: Attached) -> Model:
    return attached.synthesizer.model


@pytest.fixture(scope="module")
def voice(attached: Attached) -> Conditionals:
    return attached.synthesizer.voices[DEFAULT_VOICE]


def upstream_tokens(upstream: ChatterboxTTS, voice: Conditionals, sampling: Sampling, count: int) -> torch.Tensor:
    """Draw tokens with upstream's own loop and a fixed seed."""
    torch.manual_seed(3)
    drawn: torch.Tensor = upstream.t3.inference(
        t3_cond=for_upstream(voice).t3,
        text_tokens=upstream_text_tokens(upstream, TEXT),
        max_new_tokens=count,
        temperature=sampling.temperature,
        cfg_weight=sampling.cfg_weight,
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )[0]
    return drawn


def llama(model: Model) -> T3Decoder:
    assert isinstance(model.decoder, T3Decoder)
    return model.decoder


def our_tokens(decoder: TokenDecoder, model: Model, voice: Conditionals, sampling: Sampling, count: int) -> Any:
    torch.manual_seed(3)
    return decoder(voice.t3, model.text_tokens(TEXT), sampling=sampling, max_new_tokens=count)


def test_greedy_tokens_equal_those_of_upstream(model: Model, upstream: ChatterboxTTS, voice: Conditionals) -> None:
    """The sequence is long enough for attention to read more positions than at the beginning."""
    theirs = upstream_tokens(upstream, voice, GREEDY, 220)
    ours = our_tokens(model.decoder, model, voice, GREEDY, 220)
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
    model: Model, upstream: ChatterboxTTS, voice: Conditionals, sampling: Sampling
) -> None:
    """On a CPU, a seed gives exactly the tokens of upstream."""
    theirs = upstream_tokens(upstream, voice, sampling, 60)
    ours = our_tokens(model.decoder, model, voice, sampling, 60)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
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
        token, _, _ = REGIONS[region].function(
            norm, head, *tables, x, controls, noise, used, step, torch.tensor([FREE])
        )
        seen[token] += 1
    statistic = float(((seen - count * wanted) ** 2 / (count * wanted)).sum())
    assert statistic < 16.27, "the 0.1 % point of chi-squared with three degrees of freedom"


@pytest.mark.parametrize("check_every", [1, 7, 1000])
def test_tokens_after_the_stop_token_are_dropped(
    model: Model,
    upstream: ChatterboxTTS,
    voice: Conditionals,
    monkeypatch: pytest.MonkeyPatch,
    check_every: int,
) -> None:
    head = upstream.t3.speech_head
    kept = head.weight
    try:
        # Make the seventh greedy token the stop token.
        free = our_tokens(model.decoder, model, voice, GREEDY, 12)
        changed = kept.detach().clone()
        changed[[t3_blocks.STOP_SPEECH_TOKEN, int(free[6])]] = changed[[int(free[6]), t3_blocks.STOP_SPEECH_TOKEN]]
        head.weight = torch.nn.Parameter(changed)
        theirs = upstream_tokens(upstream, voice, GREEDY, 12)
        monkeypatch.setattr(decoder, "_CHECK_EVERY_ON_CPU", check_every)
        tensors = {**model.tensors, "t3.speech_head.weight": changed}
        ours = our_tokens(T3Decoder(NamedTensors(tensors, "t3."), eager), model, voice, GREEDY, 12)
    finally:
        head.weight = kept
    assert theirs[-1] == t3_blocks.STOP_SPEECH_TOKEN == upstream.t3.hp.stop_speech_token
    assert len(theirs) == 7
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_text_longer_than_the_kv_cache_is_refused(model: Model, voice: Conditionals) -> None:
    with pytest.raises(BadInputError, match=f"the cache has at most {MAX_POSITIONS}") as caught:
        model.decoder(voice.t3, model.text_tokens(TEXT), sampling=GREEDY, max_new_tokens=MAX_POSITIONS)
    assert "split the text" in caught.value.next_step


def test_speech_longer_than_the_limit_of_the_flow_is_refused(model: Model, voice: Conditionals) -> None:
    with pytest.raises(BadInputError, match=f"the limit is {MAX_FRAMES}") as caught:
        model.flow(torch.zeros(MAX_FRAMES // 2, dtype=torch.int64), voice.gen)
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
    found = t3_blocks.attend(q, k, v, attn_mask=seen)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_t3_computes_with_half_the_bytes_and_s3gen_in_float32(
    dtype: torch.dtype, model: Model, voice: Conditionals
) -> None:
    decoder = T3Decoder(NamedTensors(model.tensors, "t3."), eager, dtype=dtype)
    with torch.inference_mode():
        wide = t3_prompt.embed_prompt(model.decoder._weights, voice.t3, model.text_tokens(TEXT), 0.5).embeddings
        narrow = wide.to(dtype)
    outputs = []
    for prefill, x, cosine, sine in (
        (llama(model)._prefill[0], wide, llama(model)._cosine, llama(model)._sine),
        (decoder._prefill[0], narrow, decoder._cosine, decoder._sine),
    ):
        output, _, _ = prefill(x, cosine[: x.size(1)], sine[: x.size(1)])
        outputs.append(output.float())
    similarity = torch.nn.functional.cosine_similarity(outputs[0], outputs[1], dim=-1)
    assert similarity.min() > 0.999
    drawn = our_tokens(decoder, model, voice, GREEDY, 5)
    assert drawn.shape == (5,)
    assert ((drawn >= 0) & (drawn < 8194)).all()
    assert {tensor.dtype for tensor in model.tensors.values()} == {torch.float32}


def test_values_that_float16_cannot_hold_end_the_start(mini: Path) -> None:
    narrow = load(mini, t3_dtype=torch.float16)
    with torch.inference_mode():
        narrow.tensors["t3.tfmr.layers.0.mlp.down_proj.weight"].mul_(1e5).clamp_(-6e4, 6e4)
    found = read_builtin_voice(mini)
    assert found is not None
    with pytest.raises(ModelError, match="T3 computes values that are not finite, in float16") as caught:
        Synthesizer(narrow, {DEFAULT_VOICE: found}).check()
    assert "--t3-dtype bfloat16" in caught.value.next_step


def test_rotary_embedding_is_exact_in_bfloat16(mini: Path, model: Model, tmp_path: Path) -> None:
    execution = Execution(t3_dtype="bfloat16")
    cache = tmp_path / "cache"
    options = StartOptions(warm=tmp_path, weights=mini, cache=cache, policy="off", execution=execution)
    narrow = attach(prepare(options))
    decoder = llama(narrow.synthesizer.model)
    assert decoder.dtype == torch.bfloat16
    tensors = narrow.synthesizer.model.tensors.items()
    assert {tensor.dtype for name, tensor in tensors if ".tfmr.layers." in name} == {torch.bfloat16}
    assert (decoder._cosine.float() - llama(model)._cosine).abs().max() <= 2**-8, "rounded once, at the end"
    speech = narrow.synthesizer.synthesize("Hello, world.", seed=1, max_new_tokens=12)
    assert len(speech.samples) > 0


@pytest.mark.parametrize("count", [3, 12, 61])
def test_mel_spectrogram_equals_that_of_upstream(
    model: Model, upstream: ChatterboxTTS, voice: Conditionals, count: int
) -> None:
    tokens = torch.arange(count) * 97 % 6561
    torch.manual_seed(5)
    theirs = upstream.s3gen.flow_inference(tokens[None], ref_dict=for_upstream(voice).gen, finalize=True)
    torch.manual_seed(5)
    ours = model.flow(tokens, voice.gen)
    assert ours.shape == theirs.shape == (1, 80, 2 * count)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("count", [3, 12, 61])
def test_audio_equals_that_of_upstream(model: Model, upstream: ChatterboxTTS, voice: Conditionals, count: int) -> None:
    mel = model.flow(torch.arange(count) * 89 % 6561, voice.gen)
    torch.manual_seed(6)
    theirs = upstream.s3gen.hift_inference(mel)[0].clone()
    theirs[:, : len(upstream.s3gen.trim_fade)] *= upstream.s3gen.trim_fade
    torch.manual_seed(6)
    ours = model.vocoder(mel)
    assert ours.shape == (960 * count,)
    assert signal_to_noise(theirs[0], ours) >= 100


def signal_to_noise(signal: torch.Tensor, other: torch.Tensor) -> float:
    """Return the ratio of signal to difference in dB."""
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


def test_constants_and_voice_embeddings_equal_those_of_upstream(
    model: Model, upstream: ChatterboxTTS, voice: Conditionals
) -> None:
    """What upstream's modules compute in their constructors is computed here without them, bit by bit."""
    flow_module, vocoder_module = upstream.s3gen.flow, upstream.s3gen.mel2wav
    tables = upstream.t3.tfmr.rotary_emb(torch.empty(0), torch.arange(MAX_POSITIONS)[None])
    x, times = torch.randn(1, 77, 512), torch.linspace(0, 1, 11)
    embedded, distances, _ = flow_module.encoder.embed(x, torch.ones(1, 1, 77, dtype=torch.bool))
    weights = NamedTensors(model.tensors, "t3.")
    with torch.inference_mode():
        pairs = {
            "voice": (
                t3_prompt.embed_voice(weights, voice.t3),
                upstream.t3.prepare_conditioning(for_upstream(voice).t3),
            ),
            "cosines": (llama(model)._cosine, tables[0][0]),
            "sines": (llama(model)._sine, tables[1][0]),
            "tokens": (model.flow._embed(x, "embed")[0], embedded),
            "distances": (model.flow._embed(x, "embed")[1], distances),
            "times": (flow.time_embeddings(times), flow_module.decoder.estimator.time_embeddings(times)),
            "window": (model.vocoder._window, vocoder_module.stft_window),
            "fade": (model.vocoder._fade, upstream.s3gen.trim_fade),
        }
    for name, (ours, theirs) in pairs.items():
        assert torch.equal(ours, theirs), name
    sines = vocoder_module.m_source.l_sin_gen
    assert (sines.sine_amp, sines.noise_std, sines.voiced_threshold) == (
        vocoder._AMPLITUDE,
        vocoder._NOISE,
        vocoder._VOICED_HZ,
    )
    assert sines.harmonic_num + 1 == vocoder._WAVES
    assert vocoder_module.audio_limit == vocoder._MAX_SAMPLE
    assert flow_module.decoder.inference_cfg_rate == flow._GUIDANCE
    hp = upstream.t3.hp
    assert (hp.start_text_token, hp.stop_text_token) == (*LLAMA_FRAME.start, *LLAMA_FRAME.stop)
    assert (hp.start_speech_token, hp.max_text_tokens) == (t3_blocks.START_SPEECH_TOKEN, MAX_TEXT_TOKENS)


@pytest.mark.slow
def test_comparison_with_upstream_detects_differences(attached: Attached, upstream: ChatterboxTTS) -> None:
    text = "Hello, world."
    synthesizer = attached.synthesizer
    voice = synthesizer.voices[DEFAULT_VOICE]
    upstreams = fidelity.reference(upstream, voice, text)
    found = fidelity.compare(synthesizer, text, upstreams)
    assert found["greedy_tokens_equal"] == len(upstreams["tokens"]) == fidelity.TOKENS
    assert found["next_tokens_equal"] == 1.0
    assert found["mel_difference"] <= 1e-5
    assert found["sound_decibels"] >= 100
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
    model: Model, upstream: ChatterboxTTS, voice: Conditionals, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Operations() as flowing:
        mel = model.flow(torch.arange(12), voice.gen)
    with Operations() as vocoding:
        model.vocoder(mel)
    assert len(flowing.names) > 100
    assert syncs(flowing.names) == []
    assert len(vocoding.names) > 100
    assert syncs(vocoding.names) == []
    with Operations() as upstreams:
        upstream.s3gen.flow_inference(torch.arange(12)[None], ref_dict=for_upstream(voice).gen, finalize=True)
    assert syncs(upstreams.names), "upstream has host syncs; otherwise this test detects nothing"
    monkeypatch.setattr(decoder, "_CHECK_EVERY_ON_CPU", 8)
    counts = []
    for count in (8, 16):
        with Operations() as decoding:
            our_tokens(model.decoder, model, voice, GREEDY, count)
        counts.append(len(syncs(decoding.names)))
    assert counts[1] - counts[0] <= 1, "one more check for the end of speech, and nothing per token"


def test_synthesis_does_not_compute_weight_norms(model: Model, upstream: ChatterboxTTS, voice: Conditionals) -> None:
    mel = model.flow(torch.arange(12), voice.gen)
    with Operations() as ours:
        model.vocoder(mel)
    with Operations() as theirs:
        upstream.s3gen.hift_inference(mel)
    assert [name for name in ours.names if "weight_norm" in name] == []
    assert len([name for name in theirs.names if "weight_norm" in name]) > 70
