"""The warm-up runs the levels it is told to, reports them, and leaves the model as it was."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest
import torch

import chatterbox_prewarm
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.families.conditionals import load_voice
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.voices import detached
from chatterbox_prewarm.model.warmup.inputs import LONG_TEXT, MEDIUM_TEXT, SHORT_TEXT, reference_audio, reference_clip
from chatterbox_prewarm.model.warmup.levels import SWITCH
from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
from chatterbox_prewarm.system.metrics import WarmupMetrics
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached


def test_all_levels_run_and_leave_the_model_as_it_was(
    attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = attached.synthesizer.model
    model.conds = voice = detached(attached.synthesizer.voices[DEFAULT_VOICE])
    torch.manual_seed(11)
    state, python = torch.random.get_rng_state(), random.getstate()
    lines: list[str] = []
    try:
        metrics = ChatterboxWarmupStrategy(progress=lines.append).perform_full_warmup(model)
        assert model.conds is voice
    finally:
        model.conds = None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [phase.name for phase in metrics.phases] == [f"warm-up level {level}" for level in (1, 2, 3)]
    assert len(lines) == 10
    assert any("upstream's own code" in line for line in lines)
    assert sum("synthesis" in line for line in lines) == 3
    assert list(tmp_path.iterdir()) == [], "its clips are gone"
    assert random.getstate() == python


def test_only_the_chosen_levels_run(attached: Attached) -> None:
    metrics = WarmupMetrics()
    strategy = ChatterboxWarmupStrategy(levels=[1], metrics=metrics, progress=lambda _: None)
    strategy.perform_full_warmup(attached.synthesizer.model)
    assert [phase.name for phase in metrics.phases] == ["warm-up level 1"]


def test_a_device_that_is_too_small_gets_the_levels_below(attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory cannot be filled here, so the level reports what torch would."""

    def fill(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lines: list[str] = []
    strategy = ChatterboxWarmupStrategy(levels=[1, 2, 3], progress=lines.append)
    monkeypatch.setattr(strategy, "warm_up_kernels", fill)
    metrics = strategy.perform_full_warmup(attached.synthesizer.model)
    assert strategy.levels == (1,), "what a manifest will say"
    assert [phase.name for phase in metrics.phases] == ["warm-up level 1", "warm-up level 2"]
    assert lines[-1] == "level 2: out of memory; the warm-up ends below it"


@pytest.mark.parametrize("levels", [[], [0], [1, 4]])
def test_levels_that_do_not_exist_are_refused(levels: list[int]) -> None:
    with pytest.raises(BadInputError, match="levels"):
        ChatterboxWarmupStrategy(levels=levels)


def test_it_can_be_switched_off_by_argument_and_by_environment(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    off = ChatterboxWarmupStrategy(enabled=False, progress=lines.append)
    monkeypatch.setenv(SWITCH, "off")
    also_off = ChatterboxWarmupStrategy(progress=lines.append)
    for strategy in (off, also_off):
        assert strategy.perform_full_warmup(attached.synthesizer.model).phases == []
        strategy.warm_up_models(attached.synthesizer.model)
    assert lines == ["warm-up is switched off"] * 2


def test_the_texts_are_short_medium_and_long() -> None:
    assert len(SHORT_TEXT) < 20 < len(MEDIUM_TEXT) < 120 < len(LONG_TEXT)


def test_the_reference_audio_is_the_same_each_time_and_its_file_goes_away() -> None:
    first, second = reference_audio(2.0), reference_audio(2.0)
    assert first.shape == (48_000,)
    assert (first == second).all()
    assert 0.4 < abs(first).max() <= 0.5
    with reference_clip() as one, reference_clip() as two:
        assert one != two
        assert one.is_file()
    assert not one.exists()


def test_the_public_names_are_there_and_no_others() -> None:
    for name in chatterbox_prewarm.__all__:
        assert callable(getattr(chatterbox_prewarm, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = chatterbox_prewarm.no_such_name


def test_enhanced_loading_gives_upstreams_class_with_a_voice(mini: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    model = chatterbox_prewarm.from_pretrained_with_warmup(
        "cpu",
        weights=mini,
        cache=tmp_path / "cache",
        strategy=ChatterboxWarmupStrategy(levels=[1], progress=lines.append),
    )
    from chatterbox.tts import ChatterboxTTS

    assert isinstance(model, ChatterboxTTS)
    assert model.conds is not None
    assert any("T3" in line for line in lines)


_ENHANCED = """
import json, sys
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
print("JSON" + json.dumps({"fetched": fetched, "speaker": speaker, "class": type(model).__name__}))
"""


def test_enhanced_loading_takes_a_warm_state_and_fetches_what_is_not_there(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "XDG_CACHE_HOME": str(tmp_path / "home"),
        }
        ran = subprocess.run(
            [sys.executable, "-c", _ENHANCED, str(baked), str(mini), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.rpartition("JSON")[2])
    assert f"{ENGLISH.repository} at {ENGLISH.revision[:12]} could not be fetched" in found["fetched"]
    assert found["class"] == "ChatterboxTTS"
    voice = load_voice(baked / "conditionals" / f"{DEFAULT_VOICE}.safetensors")
    assert found["speaker"] == voice.t3.speaker_emb.flatten().tolist()
    assert "level 1" not in ran.stderr, "what is loaded is not warmed up again"
