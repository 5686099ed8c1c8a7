"""Test the warm model: upstream's class and methods, with the regions of the warm state."""

from __future__ import annotations

import inspect
import json
import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import chatterbox_prewarm
from chatterbox_prewarm.errors import BadInputError, ModelError
from chatterbox_prewarm.families.conditionals import load_voice
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.model import load
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.t3 import T3Decoder
from chatterbox_prewarm.model.regions.t3_blocks import STOP_SPEECH_TOKEN
from chatterbox_prewarm.model.synthesis import Synthesizer
from chatterbox_prewarm.model.upstream import load_upstream
from chatterbox_prewarm.model.voices import detached
from chatterbox_prewarm.model.warmup.settings import SWITCH
from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
from chatterbox_prewarm.start.pretrained import PrewarmedChatterbox, from_pretrained_with_warmup
from chatterbox_prewarm.state.state import State
from chatterbox_prewarm.weights.record import RECORD_NAME, read_record, record
from chatterbox_prewarm.weights.variants import ENGLISH
from tests.conftest import run_cli, writable_copy
from tests.helpers.clips import DELAY, SECONDS, mp3, without_tag

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.model.regions.executors import BoundRegion
    from chatterbox_prewarm.model.regions.region import Region

TEXT = "Hello, world."
#: Frames per second of the mel spectrogram of a voice.
MEL_RATE = 50


@pytest.fixture(scope="module")
def model(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> PrewarmedChatterbox:
    """Load the model with string arguments, as users do, and limit its speech to 12 tokens."""
    cache = tmp_path_factory.mktemp("cache")
    return PrewarmedChatterbox.from_pretrained_with_warmup(
        "cpu", warmup=True, weights=str(mini), warm=str(baked), cache=str(cache)
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit `generate` to 12 speech tokens: random weights do not stop by themselves."""
    monkeypatch.setattr("chatterbox_prewarm.start.pretrained.MAX_NEW_TOKENS", 12)


def test_it_is_a_subclass_of_upstreams_class_and_is_warm(model: PrewarmedChatterbox) -> None:
    from chatterbox.tts import ChatterboxTTS

    assert issubclass(PrewarmedChatterbox, ChatterboxTTS)
    assert isinstance(model, PrewarmedChatterbox)
    assert model.warmup_completed
    assert model.conds is not None
    assert "first synthesis" in [phase["name"] for phase in model.metrics.phases]


def test_generate_has_the_signature_of_upstream() -> None:
    from chatterbox.tts import ChatterboxTTS

    for name in ("generate", "prepare_conditionals"):
        ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (PrewarmedChatterbox, ChatterboxTTS))
        assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
            (p.name, p.default, p.kind) for p in theirs.parameters.values()
        ]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"cfg_weight": 0.2, "temperature": 1.2},
        pytest.param({"exaggeration": 0.9, "top_p": 0.8}, marks=pytest.mark.slow),
    ],
)
def test_generate_gives_the_audio_of_upstream(
    model: PrewarmedChatterbox, mini: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    """Both draw from torch's global generator, and neither seeds it."""
    theirs = load_upstream(mini)
    original = type(theirs.t3).inference
    monkeypatch.setattr(
        type(theirs.t3), "inference", lambda self, **given: original(self, **{**given, "max_new_tokens": 12})
    )
    monkeypatch.setattr("chatterbox_prewarm.start.pretrained.MAX_NEW_TOKENS", 12)
    kept = model.conds
    try:
        spoken = []
        for system in (model, theirs):
            torch.manual_seed(3)
            np.random.seed(3)
            spoken.append(system.generate(TEXT, audio_prompt_path=str(clip), **settings))
    finally:
        model.conds = kept
    ours, expected = spoken
    assert ours.dtype == expected.dtype == torch.float32
    assert ours.shape == expected.shape
    assert ours.shape[0] == 1
    noise = (ours - expected).square().sum()
    assert 10 * torch.log10(expected.square().sum() / noise.clamp(min=1e-30)) > 60


@pytest.mark.usefixtures("short")
def test_generate_runs_the_regions(model: PrewarmedChatterbox, mini: Path) -> None:
    calls: list[str] = []

    def counting(region: Region, weights: Any) -> BoundRegion:
        run: Callable[..., tuple[torch.Tensor, ...]] = eager(region, weights)

        def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            calls.append(region.name)
            return run(*inputs)

        return call

    kept = model._start
    try:
        counted = load(mini, executor=counting)
        model._start = replace(kept, synthesizer=Synthesizer(counted, kept.synthesizer.voices))
        model.generate(TEXT)
    finally:
        model._start = kept
    assert {"t3_prefill", "t3_decode", "t3_sample", "flow_euler", "vocoder_trunk"} <= set(calls)


@pytest.mark.usefixtures("short")
def test_an_empty_text_is_spoken_as_by_upstream(model: PrewarmedChatterbox) -> None:
    torch.manual_seed(1)
    empty = model.generate("")
    torch.manual_seed(1)
    assert torch.equal(empty, model.generate("You need to add some text for me to talk."))


@pytest.mark.usefixtures("short")
def test_generate_warns_only_when_the_speech_reaches_the_token_limit(
    model: PrewarmedChatterbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, logger="chatterbox_prewarm.start.pretrained"):
        torch.manual_seed(3)
        cut = model.generate(TEXT)
        (warning,) = caplog.messages
        assert "reached the limit of 12 speech tokens" in warning
        assert "split the text at sentences" in warning
        caplog.clear()
        draw = T3Decoder.__call__

        def draw_and_stop(self: T3Decoder, *arguments: Any, **settings: Any) -> torch.Tensor:
            return torch.cat([draw(self, *arguments, **settings), torch.tensor([STOP_SPEECH_TOKEN])])

        monkeypatch.setattr(T3Decoder, "__call__", draw_and_stop)
        torch.manual_seed(3)
        complete = model.generate(TEXT)
    assert caplog.messages == []
    assert cut.shape == complete.shape


def test_prepare_conditionals_sets_the_voice_without_a_graph(model: PrewarmedChatterbox, clip: Path) -> None:
    kept = model.conds
    try:
        model.prepare_conditionals(clip, exaggeration=0.7)
        assert model.conds is not None
        assert model.conds is not kept
        assert float(model.conds.t3.emotion_adv) == pytest.approx(0.7)
        assert not any(t.requires_grad for t in model.conds.gen.values() if torch.is_tensor(t))
    finally:
        model.conds = kept


@pytest.mark.parametrize("channels", [1, 2])
def test_the_voice_of_an_mp3_file_without_a_length_is_that_of_the_complete_file(
    model: PrewarmedChatterbox, tmp_path: Path, channels: int
) -> None:
    complete, cut = tmp_path / "complete.mp3", tmp_path / "cut.mp3"
    complete.write_bytes(file := mp3(channels=channels, loud_first=True))
    cut.write_bytes(without_tag(file))
    kept = model.conds
    lengths = []
    try:
        for path in (complete, cut):
            model.prepare_conditionals(path)
            assert model.conds is not None
            lengths.append(model.conds.gen["prompt_feat"].size(1) / MEL_RATE)
    finally:
        model.conds = kept
    assert lengths[0] == pytest.approx(SECONDS, abs=DELAY)
    assert lengths[1] == pytest.approx(SECONDS, abs=DELAY)


def test_a_stream_has_the_audio_of_the_synthesizer(
    model: PrewarmedChatterbox, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        chunks = list(model.generate_stream_with_warmup_check(TEXT, seed=5, max_new_tokens=12, chunk_tokens=6))
    assert "not warmed up" not in caplog.text
    assert [chunk.index for chunk in chunks] == [0, 1]
    expected = list(model.generate_stream(TEXT, seed=5, max_new_tokens=12, exaggeration=0.5))
    streamed = np.concatenate([chunk.samples for chunk in chunks])
    assert np.allclose(streamed, np.concatenate([chunk.samples for chunk in expected]), atol=1e-4)


def test_a_stream_warns_before_the_warm_up(model: PrewarmedChatterbox, caplog: pytest.LogCaptureFixture) -> None:
    model.warmup_completed = False
    try:
        with caplog.at_level(logging.WARNING):
            model.generate_stream_with_warmup_check(TEXT, max_new_tokens=6).close()
    finally:
        model.warmup_completed = True
    assert "the model is not warmed up" in caplog.text


@pytest.mark.filterwarnings("ignore:PySoundFile failed", "ignore:librosa.core.audio.__audioread_load:FutureWarning")
def test_bad_input_is_refused(model: PrewarmedChatterbox, mini: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nowhere\.wav does not exist"):
        model.generate(TEXT, audio_prompt_path="nowhere.wav")
    with pytest.raises(BadInputError, match="no voice could be made from"):
        model.generate(TEXT, audio_prompt_path=__file__)
    with pytest.raises(BadInputError, match="the text is int, not a string"):
        model.generate(7)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="temperature is 'hot'"):
        model.generate(TEXT, temperature="hot")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="there is no device 'gpu'") as refused:
        from_pretrained_with_warmup("gpu", weights=mini, cache=tmp_path)
    assert "--" not in refused.value.next_step, "advice for Python, not for the command line"
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no GPU"):
            from_pretrained_with_warmup("cuda", weights=mini, cache=tmp_path)
    kept, model.conds = model.conds, None
    try:
        with pytest.raises(BadInputError, match="has no voice"):
            model.generate(TEXT)
    finally:
        model.conds = kept


def test_its_state_can_be_saved_and_loaded(model: PrewarmedChatterbox, mini: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BadInputError, match="is not empty"):
        chatterbox_prewarm.save_warmup_cache(model, str(tmp_path / "full"))
    with pytest.raises(BadInputError, match="str is not a model"):
        chatterbox_prewarm.save_warmup_cache("warm", tmp_path / "new")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="the path is 3"):
        chatterbox_prewarm.save_warmup_cache(model, 3)  # type: ignore[arg-type]
    manifest = model.save_warmup_cache(str(tmp_path / "new" / "warm"))
    assert State.read(tmp_path / "new" / "warm").manifest.set_digest == manifest.set_digest
    verified = run_cli(
        "verify",
        *("--warm", tmp_path / "new" / "warm", "--weights", mini),
        *("--cache", model.attached.prepared.options.cache),
    )
    assert verified.returncode == 0, verified.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_the_state_of_a_model_that_started_cold_is_proven(mini: Path, tmp_path: Path) -> None:
    """The warm-up in this process is all that `save_warmup_cache` needs."""
    program = (
        "import sys; from chatterbox_prewarm import from_pretrained_with_warmup, save_warmup_cache;"
        'model = from_pretrained_with_warmup("cpu", weights=sys.argv[1], cache=sys.argv[2]);'
        "save_warmup_cache(model, sys.argv[3])"
    )
    warm = tmp_path / "warm"
    paths = [str(mini), str(tmp_path / "cache"), str(warm)]
    ran = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    proven = run_cli("prove", "--warm", warm, "--weights", mini, "--cache", tmp_path / "cache")
    assert proven.returncode == 0, proven.stdout + proven.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_complete_warm_up_runs_when_families_are_damaged(baked: Path, mini: Path, tmp_path: Path) -> None:
    state = writable_copy(baked, tmp_path / "warm")
    next((state / "numba").rglob("*.nbi")).write_bytes(b"damaged")
    next((state / "bytecode").glob("*")).write_bytes(b"damaged")
    model = from_pretrained_with_warmup("cpu", weights=mini, warm=state, cache=tmp_path / "cache")
    assert {"numba", "bytecode"} <= model.attached.misses.keys()
    levels = [phase["name"] for phase in model.metrics.phases if phase["name"].startswith("warm-up")]
    assert levels == ["warm-up level 1", "warm-up level 2", "warm-up level 3"]
    assert model.warmup_completed
    assert torch.isfinite(model.generate(TEXT)).all()


def test_the_environment_switches_the_warm_up_off(
    baked: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    model = from_pretrained_with_warmup("cpu", True, weights=mini, warm=baked, cache=tmp_path / "cache")
    assert not model.warmup_completed


def test_upstreams_model_is_loaded_once_for_a_checkpoint_without_a_voice(mini: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for path in mini.iterdir():
        if path.name not in {ENGLISH.builtin_voice, RECORD_NAME}:
            os.link(path, weights / path.name)
    synthetic = read_record(mini).synthetic
    record(weights, variant=ENGLISH, repository="someone/voice", revision="a" * 40, synthetic=synthetic)
    model = from_pretrained_with_warmup("cpu", False, weights=weights, cache=tmp_path / "cache")
    assert model.conds is not None
    loads = [phase["name"] for phase in model.metrics.phases].count("upstream's model")
    assert loads == 1


def test_a_subclass_and_a_strategy_can_be_given(mini: Path, tmp_path: Path) -> None:
    class Mine(PrewarmedChatterbox):
        pass

    lines: list[str] = []
    strategy = ChatterboxWarmupStrategy("cpu", levels=[1], progress=lines.append)
    model = Mine.from_pretrained_with_warmup("cpu", weights=mini, cache=tmp_path / "cache", strategy=strategy)
    assert type(model) is Mine
    assert model.warmup_completed
    assert any("T3" in line for line in lines)
    voice = detached(model.attached.synthesizer.voices[DEFAULT_VOICE])
    assert model.conds is not None
    assert torch.equal(model.conds.t3.speaker_emb, voice.t3.speaker_emb)


_FROM_PRETRAINED = """
import json, sys, weakref
from pathlib import Path
from chatterbox_prewarm import from_pretrained_with_warmup
from chatterbox_prewarm.errors import WeightsError
warm, weights, cache = map(Path, sys.argv[1:4])
try:
    from_pretrained_with_warmup("cpu")
except WeightsError as error:
    fetched = str(error)
model = from_pretrained_with_warmup("cpu", weights=weights, warm=warm, cache=cache, policy="require")
speaker = model.conds.t3.speaker_emb.flatten().tolist()
model.prepare_conditionals(sys.argv[4])
chunks = list(model.generate_stream_with_warmup_check("Hello.", policy="require", seed=1, max_new_tokens=6))
found = {"fetched": fetched, "speaker": speaker, "class": type(model).__name__, "chunks": len(chunks)}
found["misses"] = model.metrics.to_dict()["misses"]
weights_in_memory = weakref.ref(model.t3)
del model
print("JSON" + json.dumps({**found, "freed": weights_in_memory() is None}))
"""


def test_from_pretrained_with_warmup_uses_a_warm_state_and_fetches_missing_weights(
    baked: Path, mini: Path, clip: Path, tmp_path: Path
) -> None:
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "XDG_CACHE_HOME": str(tmp_path / "home"),
        }
        ran = subprocess.run(
            [sys.executable, "-c", _FROM_PRETRAINED, str(baked), str(mini), str(tmp_path / "cache"), str(clip)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.rpartition("JSON")[2])
    assert f"{ENGLISH.repository} at {ENGLISH.revision[:12]} could not be fetched" in found["fetched"]
    assert found["class"] == "PrewarmedChatterbox"
    assert found["freed"], "the last reference to the model went, so nothing keeps its weights"
    voice = load_voice(baked / "conditionals" / f"{DEFAULT_VOICE}.safetensors")
    assert found["speaker"] == voice.t3.speaker_emb.flatten().tolist()
    assert found["chunks"] == 1
    assert found["misses"] == {}, "a voice that is added later imports modules, but the start is over"
    assert "miss in" not in ran.stderr
    assert "level 1" not in ran.stderr, "one synthesis is enough with a state that fits"
