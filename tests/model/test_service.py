"""Test `ChatterboxService`: one model in this process, for several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from chatterbox_prewarm import AdaptiveWarmup, ChatterboxService

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def service(baked: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatterboxService:
    return ChatterboxService("cpu", weights=str(mini), warm=str(baked), cache=str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_threads_take_turns_and_a_clip_speaks_only_in_its_own_call(
    service: ChatterboxService, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatterbox_prewarm.start.pretrained.MAX_NEW_TOKENS", 8)
    assert service.warmup_completed
    voice = service.model.conds
    prompts = (None, str(clip), None)
    with ThreadPoolExecutor(3) as threads:
        spoken = list(threads.map(lambda prompt: service.generate("Hello.", audio_prompt_path=prompt), prompts))
    assert all(samples.shape[0] == 1 and torch.isfinite(samples).all() for samples in spoken)
    assert service.model.conds is voice
    chunks = list(service.generate_stream("Hello.", audio_prompt_path=clip, seed=1, max_new_tokens=8, chunk_tokens=4))
    assert len(chunks) == 2
    assert service.model.conds is voice


def test_a_model_is_loaded_by_default(baked: Path, mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default paths are those of an image."""
    monkeypatch.setattr("chatterbox_prewarm.start.defaults.WEIGHTS", mini)
    monkeypatch.setattr("chatterbox_prewarm.start.defaults.WARM", baked)
    monkeypatch.setattr("chatterbox_prewarm.start.pretrained.MAX_NEW_TOKENS", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    warmup = AdaptiveWarmup()
    assert warmup.enable_conservative_warmup().level == 1
    assert warmup.model is not None
    assert warmup.model.warmup_completed  # type: ignore[union-attr]
    service = ChatterboxService()
    assert service.model.attached.prepared.usable
    assert torch.isfinite(service.generate("Hello.", exaggeration=0.7)).all()
