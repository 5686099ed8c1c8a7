"""Test the warm-up: it runs and reports the chosen levels and does not change the model."""

from __future__ import annotations

import gc
import random
import tempfile
from typing import TYPE_CHECKING

import pytest
import torch

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.reference_clip import reference_audio, reference_clip
from chatterbox_prewarm.model.upstream import load_upstream
from chatterbox_prewarm.model.voices import for_upstream
from chatterbox_prewarm.model.warmup import strategy as strategy_module
from chatterbox_prewarm.model.warmup.settings import LONG_TEXT, MEDIUM_TEXT, SHORT_TEXT, SWITCH
from chatterbox_prewarm.model.warmup.strategy import ChatterboxWarmupStrategy
from chatterbox_prewarm.system.metrics import StartMetrics

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.start.attach import Attached


def test_all_levels_run_and_do_not_change_the_model(
    attached: Attached, upstream: ChatterboxTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = upstream
    model.conds = voice = for_upstream(attached.synthesizer.voices[DEFAULT_VOICE])
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
    assert len(lines) == 8
    assert sum("synthesis" in line for line in lines) == 3
    assert list(tmp_path.iterdir()) == [], "temporary clips are removed"
    assert random.getstate() == python


def test_only_the_chosen_levels_run(upstream: ChatterboxTTS) -> None:
    metrics = StartMetrics()
    strategy = ChatterboxWarmupStrategy(levels=[1], metrics=metrics, progress=lambda _: None)
    strategy.perform_full_warmup(upstream)
    assert [phase["name"] for phase in metrics.phases] == ["warm-up level 1"]


def test_warm_up_stops_before_the_level_that_runs_out_of_memory(
    upstream: ChatterboxTTS, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This test cannot fill a GPU's memory, so the level raises the error of torch."""

    def fill(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    lines: list[str] = []
    strategy = ChatterboxWarmupStrategy(levels=[1, 2, 3], progress=lines.append)
    monkeypatch.setattr(strategy, "warm_up_cuda_kernels", fill)
    metrics = strategy.perform_full_warmup(upstream)
    assert strategy.levels == (1,), "the manifest records these levels"
    assert [phase["name"] for phase in metrics.phases] == ["warm-up level 1", "warm-up level 2"]
    assert lines[-1] == "CUDA out of memory. Tried to allocate 2.00 GiB"
    warnings = [record.getMessage() for record in caplog.records if record.name == strategy_module.__name__]
    assert warnings == ["level 2: out of memory; the warm-up stops before this level"]
    assert not strategy.warmup_completed


@pytest.mark.parametrize("levels", [[], [0], [1, 4]])
def test_unknown_levels_are_refused(levels: list[int]) -> None:
    with pytest.raises(BadInputError, match="levels"):
        ChatterboxWarmupStrategy(levels=levels)


def test_argument_and_environment_switch_the_warm_up_off(
    upstream: ChatterboxTTS, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    off = ChatterboxWarmupStrategy(enabled=False, progress=lines.append)
    monkeypatch.setenv(SWITCH, "off")
    also_off = ChatterboxWarmupStrategy(progress=lines.append)
    for strategy in (off, also_off):
        assert strategy.perform_full_warmup(upstream).phases == []
        strategy.warm_up_models(upstream)
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


@pytest.fixture(scope="module")
def plain(mini: Path) -> ChatterboxTTS:
    """Return a model as upstream loads it."""
    return load_upstream(mini)


@pytest.mark.slow
def test_a_model_of_upstream_is_warmed_up_with_the_code_that_it_runs(plain: ChatterboxTTS) -> None:
    strategy = ChatterboxWarmupStrategy("cpu", levels=[1, 2], progress=lambda _: None)
    strategy.perform_full_warmup(plain)
    assert strategy.warmup_completed
    assert not hasattr(plain, "lean"), "regions would take memory that this model never uses"
    backend = plain.t3.patched_model
    ChatterboxWarmupStrategy(device="cpu", texts=[SHORT_TEXT], progress=lambda _: None).warm_up_cuda_kernels(plain)
    assert plain.t3.patched_model is backend, "a call does not build the backend again"


@pytest.mark.slow
def test_the_warm_up_of_a_model_of_upstream_leaves_no_tensors(plain: ChatterboxTTS) -> None:
    strategy = ChatterboxWarmupStrategy("cpu", levels=[1, 2], texts=[SHORT_TEXT], progress=lambda _: None)
    strategy.perform_full_warmup(plain)  # the first run creates the backend and the tables that belong to it
    before = _tensor_bytes()
    strategy.perform_full_warmup(plain)
    assert _tensor_bytes() - before < 1_000_000


def _tensor_bytes() -> int:
    """Count the bytes of all tensors that Python objects hold, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in {torch.Tensor, torch.nn.Parameter}:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_strategy_refuses_what_it_cannot_warm_up(plain: ChatterboxTTS, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="str is not a Chatterbox model"):
        ChatterboxWarmupStrategy().perform_full_warmup("cpu")
    with pytest.raises(BadInputError, match="there is no device 'gpu'"):
        ChatterboxWarmupStrategy("gpu")
    strategy = ChatterboxWarmupStrategy("cpu")
    monkeypatch.setattr(plain, "device", "cuda")
    with pytest.raises(BadInputError, match="the model is on cuda, and this strategy is for cpu"):
        strategy.warm_up_models(plain)
