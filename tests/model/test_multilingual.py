"""Test the Multilingual model against upstream: text, tokens, audio, the data of its languages, a bake and a server."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chatterbox_prewarm.bench.t3_calls import MIN_CALLS
from chatterbox_prewarm.bench.upstream import limit_tokens
from chatterbox_prewarm.errors import BadInputError, WeightsError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.model import Model, load
from chatterbox_prewarm.model.regions.decode_state import DecodeState
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.flow import Flow
from chatterbox_prewarm.model.regions.named_tensors import NamedTensors
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.regions.t3_blocks import STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.model.streaming import generate_stream
from chatterbox_prewarm.model.synthesis import Synthesizer, seed_everything
from chatterbox_prewarm.model.upstream import load_upstream, upstream_text_tokens, variant_of
from chatterbox_prewarm.model.upstream_source import MAIN_BRANCH, Behaviour, installed_multilingual, read_multilingual
from chatterbox_prewarm.model.variants import code_of, multilingual
from chatterbox_prewarm.model.voices import for_upstream, read_builtin_voice
from chatterbox_prewarm.model.warmup.settings import SWITCH
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox
from chatterbox_prewarm.start.pretrained_multilingual import PrewarmedMultilingual
from chatterbox_prewarm.system.json_subprocess import run_module
from chatterbox_prewarm.weights.record import RECORD_NAME, read_record, record
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL, MULTILINGUAL_V3
from tests.conftest import build_once, run_cli
from tests.helpers.serving import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chatterbox_prewarm.model.conditionals import Conditionals
    from chatterbox_prewarm.model.regions.decoder import TokenDecoder
    from chatterbox_prewarm.weights.variants import Variant

TEXTS = MULTILINGUAL.samples
#: How far the difference from upstream must be below the audio. It is due to rounding.
_LEAST_DECIBELS = 100


@pytest.fixture(scope="module")
def weights(checkpoint: Callable[[Variant], Path]) -> Path:
    return checkpoint(MULTILINGUAL)


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


@pytest.mark.parametrize("language", MULTILINGUAL.languages)
def test_the_tokens_of_each_language_equal_those_of_upstream(language: str, model: Model, upstream: Any) -> None:
    text = TEXTS[language]
    model.text.check(text, language)
    ours = model.text_tokens(text, language)
    assert torch.equal(ours, upstream_text_tokens(upstream, text, language)[:1])
    assert model.text.tokenizer.token_to_id("[UNK]") not in ours
    assert variant_of(upstream) is MULTILINGUAL


def test_chinese_characters_with_the_same_code_are_numbered(model: Model) -> None:
    tokens = [model.text.tokenizer.id_to_token(number) for number in model.text.ids("日曰", "zh")]
    assert tokens[:3] == ["[zh]", "[cj_a]", "[cj_.]"]
    assert "[cj_1]" in tokens


def test_text_that_lacks_its_marks_is_refused_unless_the_deployer_accepts_it(weights: Path, model: Model) -> None:
    plain = code_of(MULTILINGUAL).read_text(weights, MULTILINGUAL, frozenset({"he", "ru"}))
    for language, text, lacking in (("he", "שלום", "points"), ("ru", "Привет", "stress")):
        with pytest.raises(BadInputError, match=lacking) as caught:
            model.text.check(text, language)
        assert f"--plain-text {language}" in (caught.value.next_step or "")
        plain.check(text, language)
    model.text.check("12.", "ru")


def test_text_in_a_script_that_the_model_does_not_know_is_refused(model: Model) -> None:
    with pytest.raises(BadInputError, match="mostly THAI"):
        model.text.check("สวัสดีชาวโลก", "en")


def _tokens_of_both(
    decoder: TokenDecoder, upstream: Any, voice: Conditionals, sampling: Sampling
) -> tuple[list[int], list[int]]:
    """Draw at most 25 speech tokens of a French text with our decoder and with upstream's."""
    prompt = upstream_text_tokens(upstream, TEXTS["fr"], "fr")
    torch.manual_seed(3)
    theirs = upstream.t3.inference(
        t3_cond=for_upstream(voice).t3,
        text_tokens=prompt,
        max_new_tokens=25,
        temperature=sampling.temperature,
        cfg_weight=sampling.cfg_weight,
        repetition_penalty=sampling.repetition_penalty,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
    )[0]
    torch.manual_seed(3)
    ours = decoder(voice.t3, prompt[:1], sampling=sampling, max_new_tokens=25)
    return ours.tolist(), theirs.tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 5.0, "repetition_penalty": 1.0, "min_p": 0.0, "top_p": 0.9}, {"temperature": 0.05}],
    ids=["defaults", "random", "greedy"],
)
def test_speech_tokens_equal_those_of_upstream(
    settings: dict[str, float], model: Model, upstream: Any, voice: Conditionals
) -> None:
    ours, theirs = _tokens_of_both(model.decoder, upstream, voice, Sampling(**{"repetition_penalty": 2.0, **settings}))
    assert ours == theirs
    assert len(ours) == 25


def test_a_step_can_be_captured_before_the_first_utterance(model: Model) -> None:
    decoder = T3Decoder(NamedTensors(model.tensors, "t3."), eager, aligned=((0, 1), (1, 2)))
    state = DecodeState(2, 64, torch.device("cpu"), torch.float32, 8194)
    decoder._step(state, decoder._samplers[False], 64)
    assert int(state.step) == 1


@pytest.mark.skipif(
    not installed_multilingual().analyzes_alignment, reason="the installed upstream does not analyze the alignment"
)
def test_speech_that_repeats_a_token_ends_as_in_upstream(model: Model, upstream: Any, voice: Conditionals) -> None:
    head = torch.zeros_like(model.tensors["t3.speech_head.weight"])
    head[5] = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    head[6] = -head[5]  # one of these two tokens is always the most likely one
    weights = NamedTensors({**model.tensors, "t3.speech_head.weight": head}, "t3.")
    decoder = T3Decoder(weights, eager, aligned=multilingual.aligned_heads(MULTILINGUAL, 2))
    kept = upstream.t3.speech_head.weight
    upstream.t3.speech_head.weight = torch.nn.Parameter(head)
    try:
        ours, theirs = _tokens_of_both(decoder, upstream, voice, Sampling(temperature=0.05, repetition_penalty=1.0))
    finally:
        upstream.t3.speech_head.weight = kept
    assert ours == theirs
    assert ours[-1] == STOP_SPEECH_TOKEN
    assert ours[-2] == ours[-3]
    free = T3Decoder(weights, eager)(
        voice.t3,
        model.text_tokens(TEXTS["fr"], "fr"),
        sampling=Sampling(temperature=0.05, repetition_penalty=1.0),
        max_new_tokens=25,
    )
    assert len(free) == 25, "without the analysis it goes on"


def _decibels(model: Model, upstream: Any, voice: Conditionals) -> float:
    """Speak with our model and with upstream's. Return how far the difference is below the audio."""
    limit_tokens(upstream, 12)
    upstream.conds = for_upstream(voice)
    seed_everything(7)
    theirs = upstream.generate(TEXTS["de"], "de").squeeze(0).numpy()
    synthesizer = Synthesizer(model, {DEFAULT_VOICE: voice})
    ours = synthesizer.synthesize(TEXTS["de"], language="de", seed=7, max_new_tokens=12).samples
    assert ours.shape == theirs.shape
    return float(10 * np.log10(np.square(theirs).sum() / max(np.square(ours - theirs).sum(), 1e-30)))


def test_audio_equals_that_of_upstream(model: Model, upstream: Any, voice: Conditionals) -> None:
    assert _decibels(model, upstream, voice) >= _LEAST_DECIBELS


def test_the_comparison_notices_one_weight_that_is_scaled_by_one_percent(
    model: Model, upstream: Any, voice: Conditionals
) -> None:
    name = "s3gen.flow.decoder.estimator.final_proj.weight"
    scaled = {**model.tensors, name: model.tensors[name] * 1.01}
    changed = replace(model, tensors=scaled, flow=Flow(NamedTensors(scaled, "s3gen.flow."), eager))
    assert _decibels(changed, upstream, voice) < _LEAST_DECIBELS


@pytest.mark.parametrize(("text", "language"), [("日", "zh"), ("あ", "ja"), ("가", "ko"), ("a", "fr"), ("?", "de")])
def test_one_character_is_spoken(text: str, language: str, model: Model, voice: Conditionals) -> None:
    speech = Synthesizer(model, {DEFAULT_VOICE: voice}).synthesize(text, language=language, seed=7, max_new_tokens=6)
    assert speech.samples.size > 0
    assert np.isfinite(speech.samples).all()


def test_a_stream_equals_the_audio(model: Model, voice: Conditionals) -> None:
    synthesizer = Synthesizer(model, {DEFAULT_VOICE: voice})
    ours = synthesizer.synthesize(TEXTS["de"], language="de", seed=7, max_new_tokens=12)
    chunks = generate_stream(synthesizer, TEXTS["de"], language="de", seed=7, max_new_tokens=12)
    assert np.abs(np.concatenate([chunk.samples for chunk in chunks]) - ours.samples).max() < 1e-5, "rounding only"


def test_the_audio_of_the_last_token_is_left_out_where_upstream_does_that(
    weights: Path, voice: Conditionals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def speaker(dropped: int) -> Synthesizer:
        behaviour = Behaviour(repetition_penalty=1.2, dropped_tokens=dropped)
        monkeypatch.setattr(multilingual, "behaviour", lambda _: behaviour)
        return Synthesizer(load(weights), {DEFAULT_VOICE: voice})

    complete, cut = speaker(0), speaker(1)
    settings: dict[str, Any] = {"seed": 7, "max_new_tokens": 12}
    longer, shorter = complete.synthesize("Hello.", **settings), cut.synthesize("Hello.", **settings)
    assert shorter.tokens.tolist() == longer.tokens.tolist()
    assert len(longer.samples) - len(shorter.samples) == 960
    for look_ahead in (None, 3):
        chunks = list(generate_stream(cut, "Hello.", chunk_tokens=5, look_ahead=look_ahead, **settings))
        assert sum(chunk.samples.size for chunk in chunks) == len(shorter.samples)


def test_the_installed_source_is_recognized() -> None:
    if importlib.util.find_spec("chatterbox.models.t3.inference.alignment_stream_analyzer") is None:
        assert installed_multilingual() == MAIN_BRANCH
        return
    assert installed_multilingual() == Behaviour(repetition_penalty=2.0, analyzes_alignment=True, dropped_tokens=0)


#: Source with the differences of the main branch: no analyzer, another default, and audio cut by the token rate.
_MAIN_T3 = "class T3:\n    pass\n"
_MAIN_TTS = """
class ChatterboxMultilingualTTS:
    def generate(self, text, language_id, temperature=0.8, repetition_penalty=1.2, min_p=0.05):
        return wav[: tokens * (S3GEN_SR // S3_TOKEN_RATE)]
"""


def test_the_main_branch_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "models" / "t3").mkdir(parents=True)
    (tmp_path / "models" / "t3" / "t3.py").write_text(_MAIN_T3)
    (tmp_path / "mtl_tts.py").write_text(_MAIN_TTS)
    assert read_multilingual(tmp_path) == MAIN_BRANCH
    if source := os.environ.get("CHATTERBOX_MAIN"):  # a checkout of the main branch, which is not in this repository
        assert read_multilingual(Path(source) / "src" / "chatterbox") == MAIN_BRANCH


def test_t3_v3_has_no_analysis_with_any_source() -> None:
    assert multilingual.behaviour(MULTILINGUAL_V3) == MAIN_BRANCH
    assert multilingual.aligned_heads(MULTILINGUAL_V3, 30) == ()


def _copy(weights: Path, target: Path) -> Path:
    """Copy a checkpoint, with links to its large files."""
    shutil.copytree(weights, target, copy_function=os.link)
    return target


def _empty_table(directory: Path) -> None:
    (directory / "Cangjie5_TC.json").unlink()
    (directory / "Cangjie5_TC.json").write_text("[]")


def _table_of_something_else(directory: Path) -> None:
    (directory / "Cangjie5_TC.json").unlink()
    (directory / "Cangjie5_TC.json").write_text('{"a": 1}')


def _no_segmenter(directory: Path) -> None:
    (directory / "pkuseg" / "spacy_ontonotes" / "features.msgpack").unlink()


def _damaged_segmenter(directory: Path) -> None:
    path = directory / "pkuseg" / "spacy_ontonotes" / "weights.npz"
    path.unlink()
    path.write_bytes(b"no archive")


@pytest.mark.parametrize("damage", [_empty_table, _table_of_something_else, _no_segmenter, _damaged_segmenter])
def test_damaged_data_of_a_language_is_an_error(damage: Callable[[Path], None], weights: Path, tmp_path: Path) -> None:
    directory = _copy(weights, tmp_path / "weights")
    damage(directory)
    text = code_of(MULTILINGUAL).read_text(directory, MULTILINGUAL)
    with pytest.raises(WeightsError):
        text.load()
    verified = run_cli("weights", "verify", directory)
    assert verified.returncode == WeightsError.exit_code


@pytest.mark.slow
def test_a_bake_refuses_damaged_data_of_a_language(weights: Path, tmp_path: Path) -> None:
    """Also data that was damaged before it was recorded, so that its digest is right."""
    directory = _copy(weights, tmp_path / "weights")
    _empty_table(directory)
    arguments = ("bake", "--weights", directory, "--warm", tmp_path / "warm", "--cache", tmp_path / "cache")
    for recorded in (False, True):
        if recorded:
            synthetic = read_record(weights).synthetic
            (directory / RECORD_NAME).unlink()
            record(directory, variant=MULTILINGUAL, repository="own", revision="unversioned", synthetic=synthetic)
        refused = run_cli(*arguments, "--profile", "eager", "--levels", "1")
        assert refused.returncode == WeightsError.exit_code, refused.stderr
        assert not (tmp_path / "warm").exists()


def test_weights_of_one_variant_are_refused_as_another(weights: Path, tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    directory.mkdir()
    renamed = {MULTILINGUAL.t3: ENGLISH.t3, MULTILINGUAL.tokenizer: ENGLISH.tokenizer}
    for name in (MULTILINGUAL.tokenizer, *MULTILINGUAL.safetensors, MULTILINGUAL.builtin_voice):
        os.link(weights / name, directory / renamed.get(name, name))
    record(directory, variant=ENGLISH, repository="own", revision="unversioned")
    with pytest.raises(WeightsError, match=r"has shape \[2454, 1024\], the model english needs \[704, 1024\]"):
        load(directory)


@pytest.fixture(scope="module")
def server(weights: Path, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Bake a state, and serve it in German by default."""
    directory = shared_dir / "multilingual"

    def bake(warm: Path) -> None:
        arguments = ("--weights", weights, "--warm", warm, "--cache", directory / "cache")
        baked = run_cli("bake", *arguments, "--profile", "eager", "--levels", "1")
        assert baked.returncode == 0, baked.stderr

    warm = build_once(directory / "warm", bake)
    server = Server(
        tmp_path_factory.mktemp("serve") / "log",
        *("--warm", warm, "--weights", weights, "--cache", directory / "cache", "--policy", "require"),
        *("--language", "de", "--plain-text", "ru"),
    )
    try:
        server.wait_ready()
        yield server
    finally:
        server.end()


@pytest.mark.slow
def test_a_warm_start_misses_nothing(server: Server) -> None:
    status = server.status()[1]
    assert status["hits"]["conditionals"] == 1
    assert status["misses"] == {}


@pytest.mark.slow
def test_the_server_speaks_the_language_of_the_request(server: Server) -> None:
    default, german, french, upstreams = (
        server.speak(**fields, temperature=0.05, cfg_weight=5)  # random weights hardly depend on the text
        for fields in ({}, {"language": "de"}, {"language": "FR"}, {"language_id": "fr"})
    )
    assert [status for status, _ in (default, german, french, upstreams)] == [200] * 4
    assert default[1] == german[1] != french[1] == upstreams[1]
    assert server.speak(input=TEXTS["zh"], language="zh")[0] == 200
    assert server.speak(input="Привет", language="ru")[0] == 200


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"language": "xx"}, {"language": ""}, {"language": "he", "input": "שלום"}])
def test_the_server_refuses_a_language_that_it_cannot_speak(fields: dict[str, str], server: Server) -> None:
    status, body = server.speak(**fields)
    assert status == 400
    assert json.loads(body)["error"]["message"]


@pytest.mark.slow
def test_the_server_lists_its_languages(server: Server) -> None:
    (entry,) = json.loads(server.ask("GET", "/v1/models")[1])["data"]
    assert entry["id"] == "multilingual"
    assert entry["languages"]["fr"] == "French"
    assert entry["language"] == "de"


@pytest.mark.slow
def test_each_call_of_upstream_leaves_hooks_behind_and_ours_are_timed_beside_it(
    server: Server,  # noqa: ARG001 - bakes the state
    weights: Path,
    shared_dir: Path,
    tmp_path: Path,
) -> None:
    warm, calls = shared_dir / "multilingual" / "warm", MIN_CALLS
    arguments = {"weights": str(weights), "warm": str(warm), "cache": str(tmp_path), "device": "cpu", "calls": calls}
    result = run_module("chatterbox_prewarm.bench.t3_calls", arguments)
    before, after = result["hooks"]
    assert before == 0
    assert (after >= 3 * calls) == installed_multilingual().analyzes_alignment
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"ours": calls, "upstream": calls}


def test_the_python_class_is_upstreams_and_speaks_with_the_regions(
    weights: Path, tmp_path: Path, voice: Conditionals
) -> None:
    from chatterbox.mtl_tts import ChatterboxMultilingualTTS

    model = PrewarmedMultilingual.from_pretrained_with_warmup(
        "cpu", False, weights=weights, cache=tmp_path / "cache", policy="off"
    )
    assert isinstance(model, ChatterboxMultilingualTTS)
    ours = list(inspect.signature(PrewarmedMultilingual.generate).parameters)
    assert ours == list(inspect.signature(ChatterboxMultilingualTTS.generate).parameters)
    chunks = list(model.generate_stream(TEXTS["fr"], "fr", seed=3, max_new_tokens=12))
    lean = load(weights)
    expected = Synthesizer(lean, {DEFAULT_VOICE: voice}).synthesize(
        TEXTS["fr"], language="fr", seed=3, max_new_tokens=12, sampling=replace(lean.sampling, exaggeration=0.5)
    )
    assert np.abs(np.concatenate([chunk.samples for chunk in chunks]) - expected.samples).max() < 1e-5, "rounding only"
    with pytest.raises(BadInputError, match="does not speak it"):
        model.generate("Hello.", "xx")


@pytest.fixture
def newer(weights: Path, tmp_path: Path) -> Path:
    """Return the checkpoint as one with T3 v3, which has the same shapes."""
    directory = _copy(weights, tmp_path / "newer")
    (directory / MULTILINGUAL.t3).rename(directory / MULTILINGUAL_V3.t3)
    (directory / RECORD_NAME).unlink()
    synthetic = read_record(weights).synthetic
    record(directory, variant=MULTILINGUAL_V3, repository="own", revision="unversioned", synthetic=synthetic)
    return directory


def test_the_python_class_loads_the_version_of_t3_that_upstreams_main_branch_would_load(
    newer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "off")
    home = tmp_path / "chatterbox-prewarm" / "weights"
    home.mkdir(parents=True)
    newer.rename(home / MULTILINGUAL_V3.name)
    model = PrewarmedMultilingual.from_pretrained("cpu", t3_model="v3")
    assert model.attached.synthesizer.model.variant == MULTILINGUAL_V3


def test_a_version_of_t3_that_does_not_exist_or_that_the_checkpoint_lacks_is_refused(
    weights: Path, newer: Path, tmp_path: Path
) -> None:
    for t3_model, directory in (("v3", weights), ("v2", newer)):
        with pytest.raises(BadInputError, match=f"t3_model '{t3_model}' needs"):
            PrewarmedMultilingual.from_local(directory, "cpu", t3_model=t3_model)
    wrong: Any
    for wrong in ("v4", "", 3, ["v3"]):
        with pytest.raises(BadInputError, match="there is no t3_model"):
            PrewarmedMultilingual.from_local(tmp_path / "missing", "cpu", t3_model=wrong)
        with pytest.raises(BadInputError, match="choose one of: v2, v3"):
            PrewarmedMultilingual.from_pretrained("cpu", wrong)


def test_the_python_class_of_another_variant_is_refused(weights: Path, mini: Path) -> None:
    with pytest.raises(BadInputError, match="PrewarmedChatterbox loads 'english'"):
        PrewarmedChatterbox.from_pretrained_with_warmup("cpu", weights=weights)
    with pytest.raises(BadInputError, match="PrewarmedMultilingual loads 'multilingual'"):
        PrewarmedMultilingual.from_pretrained_with_warmup("cpu", weights=mini)
