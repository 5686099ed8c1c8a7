"""Test Turbo and Nano against upstream: text, tokens, spectrogram, audio, streams, and voices from clips."""

from __future__ import annotations

import inspect
import os
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import torch

from chatterbox_prewarm.bench import fidelity
from chatterbox_prewarm.bench.upstream import limit_tokens
from chatterbox_prewarm.errors import BadInputError, ModelError, WeightsError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE, check_clip
from chatterbox_prewarm.model.model import Model, load
from chatterbox_prewarm.model.reference_clip import reference_audio
from chatterbox_prewarm.model.regions import decoder as decoder_module
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.gpt import GptDecoder
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.region import GPT_REGIONS
from chatterbox_prewarm.model.regions.t3_blocks import START_SPEECH_TOKEN, STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.streaming import generate_stream
from chatterbox_prewarm.model.synthesis import Synthesizer, seed_everything
from chatterbox_prewarm.model.upstream import load_upstream, variant_of
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.model.voices import for_upstream, prepare_voice, read_builtin_voice
from chatterbox_prewarm.start.attach import attach, checked
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox
from chatterbox_prewarm.start.pretrained_turbo import PrewarmedTurbo
from chatterbox_prewarm.weights.record import record
from chatterbox_prewarm.weights.variants import ENGLISH, NANO, TURBO, Variant
from tests.conftest import run_cli

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.region import Region
    from chatterbox_prewarm.start.attach import Attached

TEXTS = (
    "Hello, world. [laugh]",
    "[clear throat] wait…  what: “this” is — well \N{EN DASH} it's fine ,really",
    "A tag that [does not exist], [LAUGH] and[chuckle]without spaces[sigh].",
    "Größe, naïve, 12:30, 3.5 % and 😀",
    "no end",
)


@pytest.fixture(scope="module")
def variant() -> Variant:
    return TURBO


@pytest.fixture(scope="module")
def weights(variant: Variant, checkpoint: Callable[[Variant], Path]) -> Path:
    return checkpoint(variant)


@pytest.fixture(scope="module")
def model(weights: Path) -> Model:
    return load(weights)


@pytest.fixture(scope="module")
def voice(weights: Path) -> Conditionals:
    found = read_builtin_voice(weights)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def upstream(weights: Path, model: Model) -> Any:
    return load_upstream(weights, lean=model)


def gpt(model: Model) -> GptDecoder:
    assert isinstance(model.decoder, GptDecoder)
    return model.decoder


def upstream_tokens(upstream: Any, voice: Conditionals, text: str, sampling: Sampling, count: int) -> list[int]:
    """Draw speech tokens with upstream's code and a fixed seed; the stop token is left out."""
    code = code_of(variant_of(upstream))
    torch.manual_seed(3)
    drawn = code.upstream_speech_tokens(
        upstream,
        for_upstream(voice).t3,
        code.upstream_text_ids(upstream, text, "en"),
        sampling=sampling,
        max_new_tokens=count,
    )
    tokens: list[int] = drawn.tolist()
    return tokens


def our_tokens(decoder: Any, model: Model, voice: Conditionals, sampling: Sampling, count: int) -> list[int]:
    torch.manual_seed(3)
    tokens: list[int] = decoder(voice.t3, model.text_tokens(TEXTS[0]), sampling=sampling, max_new_tokens=count).tolist()
    return tokens


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_tokens_equal_those_of_upstream(text: str, model: Model, upstream: Any, variant: Variant) -> None:
    model.text.check(text, "en")
    expected = code_of(variant).upstream_text_ids(upstream, text, "en")
    assert model.text_tokens(text)[0].tolist() == expected
    assert variant_of(upstream) is variant


def test_a_tag_is_one_token_and_unknown_ones_are_text(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    assert {"[laugh]", "[chuckle]", "[clear throat]"} <= set(model.text.tags)
    assert len(model.text.tags) == 19
    tokens = [model.text.tokenizer.id_to_token(number) for number in model.text.ids("Ha [laugh] [laughs].", "en")]
    assert tokens.count("[laugh]") == 1
    assert "[laughs]" not in tokens
    with caplog.at_level("INFO"):
        model.text.check("Ha [laugh] [laughs].", "en")
    assert "1 tag(s) in brackets are spoken as text" in caplog.text


def test_text_in_another_script_is_refused(model: Model) -> None:
    with pytest.raises(BadInputError, match="mostly THAI"):
        model.text.check("สวัสดีชาวโลก", "en")


def test_the_tensors_that_only_a_training_uses_are_never_loaded(model: Model) -> None:
    assert not [name for name in model.tensors if "wte" in name or "text_head" in name]
    assert "t3.tfmr.wpe.weight" in model.tensors


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1},
        {"temperature": 0.05},
        {"temperature": 5.0, "top_k": 0, "repetition_penalty": 1.0},
        {"top_p": 1.0, "top_k": 5, "repetition_penalty": 2.0},
        {"temperature": 1.0, "top_k": 10_000, "top_p": 0.3},
    ],
    ids=["defaults", "greedy", "cold", "random", "top-k", "top-p"],
)
def test_speech_tokens_equal_those_of_upstream(
    settings: dict[str, float], model: Model, upstream: Any, voice: Conditionals
) -> None:
    sampling = replace(model.sampling, **settings)
    ours = our_tokens(model.decoder, model, voice, sampling, 40)
    assert ours == upstream_tokens(upstream, voice, TEXTS[0], sampling, 40)
    assert len(ours) == 40


def test_the_comparison_with_upstream_finds_no_difference(model: Model, upstream: Any, voice: Conditionals) -> None:
    synthesizer = Synthesizer(model, {DEFAULT_VOICE: voice})
    found = fidelity.compare(synthesizer, TEXTS[0], fidelity.reference(upstream, voice, TEXTS[0]))
    assert found["greedy_tokens_equal"] == fidelity.TOKENS
    assert found["next_tokens_equal"] == 1.0
    assert found["mel_difference"] <= 1e-5
    assert found["sound_decibels"] >= 100


def differences(model: Model, upstream: Any, voice: Conditionals) -> tuple[float, float]:
    """Return the largest differences of T3's hidden states and of the spectrogram, relative to the largest values."""
    text, tokens = model.text_tokens(TEXTS[0]), torch.arange(0, 6500, 325)
    conditionals = for_upstream(voice)
    with torch.inference_mode():
        start = torch.tensor([[START_SPEECH_TOKEN, *tokens[:-1].tolist()]])
        embeddings, _ = upstream.t3.prepare_input_embeds(t3_cond=conditionals.t3, text_tokens=text, speech_tokens=start)
        expected = upstream.t3.tfmr(inputs_embeds=embeddings)[0][0, -len(tokens) :]
        seed_everything(1)
        expected_mel = upstream.s3gen.flow_inference(tokens[None], ref_dict=conditionals.gen, finalize=True)
        hidden = model.decoder.hidden(voice.t3, text, tokens, sampling=model.sampling)[:, 0]
        norm = NamedTensors(model.tensors, "t3.").pair("tfmr.ln_f")
        found = torch.nn.functional.layer_norm(hidden, (hidden.size(1),), *norm)
        seed_everything(1)
        mel = model.flow(tokens, voice.gen)
    return tuple(  # type: ignore[return-value]  # there are two
        float((ours - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in ((found, expected), (mel, expected_mel))
    )


def test_hidden_states_and_spectrogram_equal_those_of_upstream(
    model: Model, upstream: Any, voice: Conditionals
) -> None:
    assert max(differences(model, upstream, voice)) <= 1e-5


def test_bfloat16_only_rounds_the_hidden_states(weights: Path, upstream: Any, voice: Conditionals) -> None:
    narrow = load(weights, t3_dtype=torch.bfloat16)
    blocks = {tensor.dtype for name, tensor in narrow.tensors.items() if name.startswith("t3.tfmr.h.")}
    assert blocks == {torch.bfloat16}
    hidden, spectrogram = differences(narrow, upstream, voice)
    assert 1e-5 < hidden <= 0.03
    assert spectrogram <= 1e-5
    assert len(narrow.decoder(voice.t3, narrow.text_tokens("Hi."), sampling=Sampling(), max_new_tokens=3)) == 3


def test_a_block_computes_in_float16(model: Model) -> None:
    outputs = []
    for dtype in (torch.float32, torch.float16):
        narrow = GptDecoder(NamedTensors(model.tensors, "t3."), eager, dtype=dtype)
        heads = model.variant.t3_width // 64
        keys, values = (torch.zeros(4, 1, heads, 64, dtype=dtype) for _ in "kv")
        x = torch.randn(1, 4, heads * 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        with torch.inference_mode():
            (y,) = narrow._prefill[0](x, torch.tensor([0]), keys, values)
        assert y.dtype == keys.dtype == dtype
        outputs.append(y.float())
    assert 0 < (outputs[0] - outputs[1]).abs().max() <= 0.002 * outputs[0].abs().max()


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("t3.tfmr.h.1.attn.c_attn.weight", 0),
        ("t3.tfmr.wpe.weight", 0),
        ("t3.cond_enc.spkr_enc.weight", 0),
        ("s3gen.flow.decoder.estimator.time_embed_mixer.weight", 1),
        ("s3gen.flow.encoder_proj.weight", 1),
    ],
)
def test_the_comparison_detects_a_weight_that_is_one_percent_larger(
    name: str, compared: int, weights: Path, upstream: Any, voice: Conditionals
) -> None:
    changed = load(weights)
    with torch.inference_mode():
        changed.tensors[name].mul_(1.01)
    found = differences(changed, upstream, voice)
    assert found[compared] > 1e-5
    assert found[1 - compared] <= 1e-5


@pytest.mark.parametrize("check_every", [1, 7, 1000])
def test_the_speech_ends_at_the_stop_token_but_not_at_the_first_one(
    check_every: int, model: Model, upstream: Any, voice: Conditionals, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = code_of(TURBO).GREEDY
    free = our_tokens(model.decoder, model, voice, greedy, 12)
    for position, expected in ((6, 7), (0, 12)):
        head, kept = model.tensors["t3.speech_head.weight"].clone(), upstream.t3.speech_head.weight
        bias, kept_bias = model.tensors["t3.speech_head.bias"].clone(), upstream.t3.speech_head.bias
        swapped = [STOP_SPEECH_TOKEN, free[position]]
        for tensor in (head, bias):
            tensor[swapped] = tensor[swapped[::-1]].clone()
        monkeypatch.setattr(decoder_module, "_CHECK_EVERY_ON_CPU", check_every)
        tensors = {**model.tensors, "t3.speech_head.weight": head, "t3.speech_head.bias": bias}
        upstream.t3.speech_head.weight = torch.nn.Parameter(head)
        upstream.t3.speech_head.bias = torch.nn.Parameter(bias)
        try:
            theirs = upstream_tokens(upstream, voice, TEXTS[0], greedy, 12)
        finally:
            upstream.t3.speech_head.weight, upstream.t3.speech_head.bias = kept, kept_bias
        ours = our_tokens(GptDecoder(NamedTensors(tensors, "t3."), eager), model, voice, greedy, 12)
        assert ours[position] == STOP_SPEECH_TOKEN
        assert len(ours) == expected
        assert [token for token in ours if token != STOP_SPEECH_TOKEN] == [
            token for token in theirs if token != STOP_SPEECH_TOKEN
        ]


def test_audio_equals_that_of_upstream_and_a_stream_equals_the_audio(
    model: Model, upstream: Any, voice: Conditionals
) -> None:
    limit_tokens(upstream, 12)
    upstream.conds = for_upstream(voice)
    seed_everything(7)
    theirs = upstream.generate(TEXTS[1]).squeeze(0).numpy()
    synthesizer = Synthesizer(model, {DEFAULT_VOICE: voice})
    ours = synthesizer.synthesize(TEXTS[1], seed=7, max_new_tokens=12)
    assert ours.samples.shape == theirs.shape
    assert ours.tokens.tolist()[-3:] == [4299] * 3
    difference = np.square(ours.samples - theirs).sum()
    assert 10 * np.log10(np.square(theirs).sum() / max(difference, 1e-30)) >= 50
    for chunk_tokens in (5, 25):
        chunks = list(generate_stream(synthesizer, TEXTS[1], seed=7, max_new_tokens=12, chunk_tokens=chunk_tokens))
        assert np.abs(np.concatenate([chunk.samples for chunk in chunks]) - ours.samples).max() < 1e-5, "rounding only"
        assert np.concatenate([chunk.tokens for chunk in chunks]).tolist() == ours.tokens.tolist()
    early = list(generate_stream(synthesizer, TEXTS[1], seed=7, max_new_tokens=40, chunk_tokens=5, look_ahead=3))
    complete = synthesizer.synthesize(TEXTS[1], seed=7, max_new_tokens=40)
    assert np.concatenate([chunk.tokens for chunk in early]).tolist() == complete.tokens.tolist()
    assert sum(chunk.samples.size for chunk in early) == complete.samples.size


def test_the_prefix_of_a_voice_is_computed_once_and_the_oldest_is_removed(model: Model, voice: Conditionals) -> None:
    weights = NamedTensors(model.tensors, "t3.")
    decoder = GptDecoder(weights, eager)
    copy = replace(voice.t3, speaker_emb=voice.t3.speaker_emb.clone())
    others = [replace(voice.t3, speaker_emb=voice.t3.speaker_emb + number) for number in (1, 2)]
    for conditionals in (voice.t3, copy, voice.t3):
        decoder.prepare_voice(conditionals)
    assert (decoder.prefixes, decoder.prefix_hits, decoder.prefix_misses) == (1, 2, 1)
    size = decoder.prefix_bytes
    assert size == 2 * 2 * 376 * weights["speech_emb.weight"].size(1) * 4, "keys and values of two layers"
    small = GptDecoder(weights, eager, max_prefix_bytes=2 * size)
    for conditionals in (voice.t3, others[0], voice.t3, others[1]):
        small.prepare_voice(conditionals)
    assert (small.prefixes, small.prefix_bytes, small.prefix_evictions) == (2, 2 * size, 1)
    small.prepare_voice(voice.t3)
    assert small.prefix_misses == 3, "the voice that was used last is still there"
    tiny = GptDecoder(weights, eager, max_prefix_bytes=0)
    assert our_tokens(tiny, model, voice, model.sampling, 20) == our_tokens(decoder, model, voice, model.sampling, 20)
    assert tiny.prefixes == 1


def test_the_check_of_a_start_continues_the_prefix_of_the_voice(model: Model, voice: Conditionals) -> None:
    calls: Counter[str] = Counter()

    def counting(region: Region, weights: Sequence[torch.Tensor]) -> BoundRegion:
        bound = eager(region, weights)

        def call(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls[region.name] += 1
            return bound(*arguments)

        return call

    decoder = GptDecoder(NamedTensors(model.tensors, "t3."), counting)
    decoder.prepare_voice(voice.t3)
    before = calls.copy()
    decoder.check(voice.t3, model.text_tokens("Hi."))
    regions = GPT_REGIONS[TURBO.t3_width]
    assert calls - before == {regions.decode.name: 2, regions.sample.name: 1}, "a step of two layers, and no prompt"
    assert decoder.prefix_misses == 1


def test_eager_mode_after_a_failure_has_the_prefixes_of_all_voices(
    weights: Path, tmp_path: Path, voice: Conditionals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start says that it has code from a machine without the GPU, and its first check fails."""
    started = attach(prepare(StartOptions(warm=tmp_path, weights=weights, cache=tmp_path / "cache", policy="off")))
    other = replace(voice, t3=replace(voice.t3, speaker_emb=voice.t3.speaker_emb + 1))
    started.synthesizer.voices["other"] = other
    untried: Any = SimpleNamespace(manifest=SimpleNamespace(cross_compiled=True))
    execution = replace(started.prepared.execution, profile="aot")
    failing = replace(started, prepared=replace(started.prepared, state=untried, execution=execution))
    check, results = Synthesizer.check, iter([RuntimeError("no kernel image is available"), None])

    def fail_first(self: Synthesizer) -> None:
        if failure := next(results):
            raise failure
        check(self)

    monkeypatch.setattr(Synthesizer, "check", fail_first)
    found = checked(failing)
    assert found.prepared.execution.profile == "eager"
    decoder = gpt(found.synthesizer.model)
    assert (decoder.prefixes, decoder.prefix_misses) == (2, 2)
    found.synthesizer.synthesize("Hello.", voice="other", seed=1, max_new_tokens=4)
    assert decoder.prefix_misses == 2, "the first request for another voice does not wait"


def test_the_check_of_a_start_finds_a_prefix_that_is_not_finite(model: Model, voice: Conditionals) -> None:
    damaged = {**model.tensors}
    damaged["t3.tfmr.h.0.mlp.c_fc.weight"] = torch.full_like(damaged["t3.tfmr.h.0.mlp.c_fc.weight"], torch.inf)
    decoder = GptDecoder(NamedTensors(damaged, "t3."), eager)
    with pytest.raises(ModelError, match="not finite, in float32"):
        decoder.check(voice.t3, model.text_tokens("Hi."))


def test_a_text_that_upstream_would_cut_off_is_refused(model: Model, voice: Conditionals) -> None:
    synthesizer = Synthesizer(model, {DEFAULT_VOICE: voice})
    text = "x" * 1100
    assert len(model.text.ids(text, "en")) > 1024
    with pytest.raises(BadInputError, match=r"has 11\d\d tokens; the model's limit is 1024"):
        synthesizer.synthesize(text, max_new_tokens=8)
    assert synthesizer.speak("x" * 1000, max_new_tokens=8).tokens.size >= 8
    with pytest.raises(BadInputError, match="the text is empty"):
        synthesizer.synthesize("  ", max_new_tokens=8)


@pytest.mark.slow
def test_nano_speaks_as_upstream_does(checkpoint: Callable[[Variant], Path]) -> None:
    weights = checkpoint(NANO)
    model, voice = load(weights), read_builtin_voice(weights)
    assert voice is not None
    upstream: Any = load_upstream(weights, lean=model)
    assert variant_of(upstream) is NANO
    assert model.text_tokens(TEXTS[1])[0].tolist() == code_of(NANO).upstream_text_ids(upstream, TEXTS[1], "en")
    for settings in ({}, {"top_k": 1}):
        sampling = replace(model.sampling, **settings)
        ours = our_tokens(model.decoder, model, voice, sampling, 40)
        assert ours == upstream_tokens(upstream, voice, TEXTS[0], sampling, 40)
    assert max(differences(model, upstream, voice)) <= 1e-5
    with torch.inference_mode():
        model.tensors["t3.tfmr.h.0.mlp.c_fc.weight"].mul_(1.01)
    assert differences(model, upstream, voice)[0] > 1e-5


def _clip(path: Path, seconds: float, rate: int = 24_000) -> Path:
    soundfile.write(path, reference_audio(seconds, sample_rate=rate), rate, subtype="PCM_16")
    return path


@pytest.mark.parametrize("seconds", [4.9, 5.0])
def test_a_clip_that_upstream_refuses_is_refused_before_anything_slow(
    seconds: float, tmp_path: Path, weights: Path
) -> None:
    clip = _clip(tmp_path / "clip.wav", seconds)
    with pytest.raises(BadInputError, match=rf"is {seconds:.2f} s long; this model needs more than 5 s"):
        check_clip(clip, name="v", longer_than=TURBO.clip_seconds)
    check_clip(clip, name="v", longer_than=ENGLISH.clip_seconds)
    arguments = ("--weights", weights, "--warm", tmp_path / "warm", "--cache", tmp_path / "cache")
    baked = run_cli("--progress", "bake", *arguments, "--profile", "eager", "--voice", f"v={clip}")
    assert baked.returncode == BadInputError.exit_code
    assert "needs more than 5 s" in baked.stderr
    assert "verifying" not in baked.stderr


def test_a_voice_of_a_clip_equals_that_of_upstream(upstream: Any, tmp_path: Path) -> None:
    clip = _clip(tmp_path / "clip.wav", 5.01, rate=22_050)
    ours = prepare_voice(upstream, clip)
    kept = upstream.conds
    upstream.prepare_conditionals(clip)
    theirs, upstream.conds = upstream.conds, kept
    assert torch.equal(ours.t3.cond_prompt_speech_tokens, theirs.t3.cond_prompt_speech_tokens)
    assert 120 < ours.t3.cond_prompt_speech_tokens.size(1) <= TURBO.prompt_tokens
    assert torch.equal(ours.t3.speaker_emb, theirs.t3.speaker_emb)
    assert torch.equal(ours.gen["prompt_feat"], theirs.gen["prompt_feat"])
    with pytest.raises(BadInputError, match="needs more than 5 s"):
        prepare_voice(upstream, _clip(tmp_path / "short.wav", 5.0))


@pytest.mark.slow
@pytest.mark.parametrize(("given", "claimed"), [(NANO, TURBO), (TURBO, NANO)], ids=["nano", "turbo"])
def test_the_t3_of_one_is_refused_as_the_other(
    given: Variant, claimed: Variant, checkpoint: Callable[[Variant], Path], tmp_path: Path
) -> None:
    directory = tmp_path / "weights"
    shutil.copytree(checkpoint(given), directory, copy_function=os.link)
    (directory / given.t3).rename(directory / claimed.t3)
    (directory / "weights.json").unlink()
    record(directory, variant=claimed, repository="own", revision="unversioned")
    with pytest.raises(WeightsError, match=f"the model {claimed.name} needs"):
        load(directory)


def _no_merges(directory: Path) -> None:
    (directory / "merges.txt").unlink()
    (directory / "merges.txt").write_text("#version: 0.2\nnot a merge of this\n")


def _tags_with_other_numbers(directory: Path) -> None:
    (directory / "added_tokens.json").unlink()
    (directory / "added_tokens.json").write_text('{"[laugh]": 50300}')


def _no_object(directory: Path) -> None:
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer_config.json").write_text("[]")


@pytest.mark.parametrize("damage", [_no_merges, _tags_with_other_numbers, _no_object])
def test_a_damaged_tokenizer_is_an_error(damage: Callable[[Path], None], weights: Path, tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    shutil.copytree(weights, directory, copy_function=os.link)
    damage(directory)
    with pytest.raises(WeightsError):
        code_of(TURBO).read_text(directory, TURBO)
    assert run_cli("weights", "verify", directory).returncode == WeightsError.exit_code


def test_the_english_model_has_no_top_k(attached: Attached) -> None:
    with pytest.raises(BadInputError, match="the model english has no setting 'top_k'"):
        attached.synthesizer.synthesize("Hello.", max_new_tokens=6, sampling=Sampling(top_k=5))


def test_the_python_class_is_upstreams_and_speaks_with_the_regions(
    weights: Path, tmp_path: Path, voice: Conditionals, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatterbox.tts_turbo import ChatterboxTurboTTS

    monkeypatch.setattr("chatterbox_prewarm.start.pretrained.MAX_NEW_TOKENS", 11)
    model = PrewarmedTurbo.from_pretrained_with_warmup(
        "cpu", False, weights=weights, cache=tmp_path / "cache", policy="off"
    )
    assert isinstance(model, ChatterboxTurboTTS)
    for name in ("generate", "prepare_conditionals"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (PrewarmedTurbo, ChatterboxTurboTTS))
        assert [(entry.name, entry.default) for entry in ours.parameters.values()] == [
            (entry.name, entry.default) for entry in theirs.parameters.values()
        ]
    expected = Synthesizer(load(weights), {DEFAULT_VOICE: voice}).synthesize(TEXTS[0], seed=3, max_new_tokens=12)
    seed_everything(3)
    assert np.array_equal(model.generate(TEXTS[0])[0].numpy(), expected.samples)
    chunks = list(model.generate_stream(TEXTS[0], seed=3, max_new_tokens=12))
    assert np.array_equal(np.concatenate([chunk.samples for chunk in chunks]), expected.samples)
    with pytest.raises(BadInputError, match="needs more than 5 s"):
        model.generate("Hello.", audio_prompt_path=_clip(tmp_path / "short.wav", 4.9))
    quiet = _clip(tmp_path / "clip.wav", 5.5)
    model.generate("Hello.", audio_prompt_path=quiet)
    normal = model.conds.gen["prompt_feat"]
    model.generate("Hello.", audio_prompt_path=quiet, norm_loudness=False)
    assert not torch.equal(normal, model.conds.gen["prompt_feat"])


def test_the_python_class_uses_as_much_of_a_clip_as_upstreams_class() -> None:
    from chatterbox.tts_turbo import ChatterboxTurboTTS

    PrewarmedTurbo._inherit()
    for name in ("ENC_COND_LEN", "DEC_COND_LEN"):
        assert getattr(PrewarmedTurbo, name) == getattr(ChatterboxTurboTTS, name)
    assert ChatterboxTurboTTS.ENC_COND_LEN > PrewarmedChatterbox.ENC_COND_LEN, "those of the English class are shorter"
