"""Test the warm-up: it runs and reports the chosen levels and does not change the model."""

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
from chatterbox_prewarm.model.reference_clip import reference_audio, reference_clip
from chatterbox_prewarm.model.voices import detached
from chatterbox_prewarm.model.warmup.settings import LONG_TEXT, MEDIUM_TEXT, SHORT_TEXT, SWITCH
from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
from chatterbox_prewarm.system.metrics import WarmupMetrics
from chatterbox_prewarm.weights.variants import ENGLISH

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached


def test_all_levels_run_and_do_not_change_the_model(
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
    assert [phase["name"] for phase in metrics.phases] == [f"warm-up level {level}" for level in (1, 2, 3)]
    assert len(lines) == 10
    assert any("upstream's own code" in line for line in lines)
    assert sum("synthesis" in line for line in lines) == 3
    assert list(tmp_path.iterdir()) == [], "temporary clips are removed"
    assert random.getstate() == python


def test_only_the_chosen_levels_run(attached: Attached) -> None:
    metrics = WarmupMetrics()
    strategy = ChatterboxWarmupStrategy(levels=[1], metrics=metrics, progress=lambda _: None)
    strategy.perform_full_warmup(attached.synthesizer.model)
    assert [phase["name"] for phase in metrics.phases] == ["warm-up level 1"]


def test_warm_up_stops_before_the_level_that_runs_out_of_memory(
    attached: Attached, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This test cannot fill a GPU's memory, so the level raises the error of torch."""

    def fill(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lines: list[str] = []
    strategy = ChatterboxWarmupStrategy(levels=[1, 2, 3], progress=lines.append)
    monkeypatch.setattr(strategy, "warm_up_kernels", fill)
    metrics = strategy.perform_full_warmup(attached.synthesizer.model)
    assert strategy.levels == (1,), "the manifest records these levels"
    assert [phase["name"] for phase in metrics.phases] == ["warm-up level 1", "warm-up level 2"]
    assert lines[-1] == "level 2: out of memory; the warm-up stops before this level"


@pytest.mark.parametrize("levels", [[], [0], [1, 4]])
def test_unknown_levels_are_refused(levels: list[int]) -> None:
    with pytest.raises(BadInputError, match="levels"):
        ChatterboxWarmupStrategy(levels=levels)


def test_argument_and_environment_switch_the_warm_up_off(attached: Attached, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    off = ChatterboxWarmupStrategy(enabled=False, progress=lines.append)
    monkeypatch.setenv(SWITCH, "off")
    also_off = ChatterboxWarmupStrategy(progress=lines.append)
    for strategy in (off, also_off):
        assert strategy.perform_full_warmup(attached.synthesizer.model).phases == []
        strategy.warm_up_models(attached.synthesizer.model)
    assert lines == ["warm-up is switched off"] * 2


def test_texts_are_short_medium_and_long() -> None:
    assert len(SHORT_TEXT) < 20 < len(MEDIUM_TEXT) < 120 < len(LONG_TEXT)


def test_reference_audio_is_deterministic_and_its_file_is_removed() -> None:
    first, second = reference_audio(2.0), reference_audio(2.0)
    assert first.shape == (48_000,)
    assert (first == second).all()
    assert 0.4 < abs(first).max() <= 0.5
    with reference_clip() as one, reference_clip() as two:
        assert one != two
        assert one.is_file()
    assert not one.exists()


def test_public_names_exist() -> None:
    for name in chatterbox_prewarm.__all__:
        assert callable(getattr(chatterbox_prewarm, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = chatterbox_prewarm.no_such_name


def test_from_pretrained_with_warmup_returns_the_class_of_upstream_with_a_voice(mini: Path, tmp_path: Path) -> None:
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


_FROM_PRETRAINED = """
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


def test_from_pretrained_with_warmup_uses_a_warm_state_and_fetches_missing_weights(
    baked: Path, mini: Path, tmp_path: Path
) -> None:
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "XDG_CACHE_HOME": str(tmp_path / "home"),
        }
        ran = subprocess.run(
            [sys.executable, "-c", _FROM_PRETRAINED, str(baked), str(mini), str(tmp_path / "cache")],
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
    assert "level 1" not in ran.stderr, "a loaded state needs no warm-up"
