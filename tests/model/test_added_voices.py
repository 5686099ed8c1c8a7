"""A voice added at run time equals the baked voice of the same clip; a worker keeps a limited number of voices."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.families.conditionals import voice_of, voice_tensors
from chatterbox_prewarm.model.synthesis import Synthesizer
from chatterbox_prewarm.model.voices import prepare_voice
from chatterbox_prewarm.serve.http.decode_clip import decode
from chatterbox_prewarm.serve.voices.voice_errors import UnusableVoiceError
from chatterbox_prewarm.serve.voices.voice_store import VoiceStore
from chatterbox_prewarm.serve.workers.voice_process import make_conditionals, make_voice, voice_bytes
from chatterbox_prewarm.serve.workers.worker_config import WorkerConfig
from chatterbox_prewarm.serve.workers.worker_voices import VoiceCache, voice_sizes
from chatterbox_prewarm.weights.record import read_record
from tests.helpers.added_voices import sound_file, tone

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox.tts import ChatterboxTTS

    from chatterbox_prewarm.start.attach import Attached

TEXT: dict[str, Any] = {"text": "Hello, world.", "seed": 5, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def made(attached: Attached, clip: Path) -> bytes:
    """Return the file of a voice that is made from an uploaded clip."""
    return asyncio.run(_upload(attached, clip.read_bytes()))


async def _upload(attached: Attached, clip: bytes) -> bytes:
    return await make_voice([WorkerConfig(start=attached.prepared.options)], await decode(clip))


def _file(attached: Attached, upstream: ChatterboxTTS, clip: bytes) -> bytes:
    """Return the file of the voice of a clip."""
    record = read_record(attached.prepared.options.weights)
    voices = {record.variant: make_conditionals(upstream, clip)}
    return voice_bytes(voices, {record.variant: record.set_digest}, clip)


@pytest.fixture
def store(attached: Attached, tmp_path: Path) -> VoiceStore:
    record = read_record(attached.prepared.options.weights)
    store = VoiceStore(tmp_path, {record.variant: record.set_digest})
    store.baked[record.variant] = voice_sizes(attached.synthesizer)
    return store


def test_an_uploaded_voice_equals_the_baked_voice_of_the_same_clip(
    attached: Attached, upstream: ChatterboxTTS, clip: Path, made: bytes, store: VoiceStore, tmp_path: Path
) -> None:
    baked = prepare_voice(upstream, clip)
    entry = store.add("ann", made)
    digest = store.digest("ann")
    assert digest is not None
    synthesizer = VoiceCache(attached, tmp_path).synthesizer("ann", digest)
    for name, tensor in voice_tensors(baked).items():
        found = voice_tensors(synthesizer.voices["ann"])[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    ours = synthesizer.synthesize(voice="ann", **TEXT)
    theirs = Synthesizer(attached.synthesizer.model, {"ann": baked}).synthesize(voice="ann", **TEXT)
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert np.array_equal(ours.samples, theirs.samples)
    assert not np.array_equal(ours.samples, attached.synthesizer.synthesize(**TEXT).samples)
    assert entry.created is not None
    assert store.get("ann").problem is None


def test_making_a_voice_changes_neither_the_model_nor_the_disk(
    attached: Attached, upstream: ChatterboxTTS, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setattr("tempfile.tempdir", None)
    before = attached.synthesizer.synthesize(**TEXT)
    first, second = (load(_file(attached, upstream, clip.read_bytes())) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert np.array_equal(attached.synthesizer.synthesize(**TEXT).samples, before.samples)
    assert upstream.conds is None


def test_the_shortest_and_the_longest_clip_make_a_voice_of_bounded_size(
    attached: Attached, upstream: ChatterboxTTS, store: VoiceStore
) -> None:
    sizes = {}
    for seconds in (1.0, 10.0, 12.3, 60.0):
        random = np.random.default_rng(0).normal(0, 0.05, int(seconds * 24_000))
        wav = sound_file(np.tile(tone(1.0), 60)[: len(random)] + random, subtype="PCM_16")
        sizes[seconds] = store.add(f"v{seconds:.0f}", _file(attached, upstream, wav)).size
    assert sizes[1.0] < 25_000
    assert sizes[10.0] == pytest.approx(sizes[60.0], abs=1000)
    assert sizes[60.0] < 180_000, "mostly the frames: 500 with 80 values each"


def test_a_worker_keeps_the_most_recently_used_voices(
    attached: Attached, made: bytes, store: VoiceStore, tmp_path: Path
) -> None:
    digests = {}
    for name in ("ann", "bob", "cem"):
        store.add(name, made)
        digests[name] = store.digest(name) or ""
    cache = VoiceCache(attached, tmp_path, max_voices=2)
    ann = cache.synthesizer("ann", digests["ann"])
    assert cache.voices == 1
    assert 0 < cache.size < len(made)
    cache.synthesizer("bob", digests["bob"])
    assert cache.synthesizer("ann", digests["ann"]) is ann
    cache.synthesizer("cem", digests["cem"])
    assert (cache.voices, cache.hits, cache.misses) == (2, 1, 3)
    assert cache.synthesizer("ann", digests["ann"]) is ann, "bob was used least recently"
    small = VoiceCache(attached, tmp_path, max_bytes=cache.size)
    for name, digest in digests.items():
        small.synthesizer(name, digest)
    assert small.size <= cache.size
    assert small.voices == 2


def test_a_new_voice_with_the_same_name_is_loaded(
    attached: Attached, upstream: ChatterboxTTS, made: bytes, store: VoiceStore, tmp_path: Path
) -> None:
    cache = VoiceCache(attached, tmp_path)
    store.add("ann", made)
    old = store.digest("ann") or ""
    first = cache.synthesizer("ann", old)
    store.delete("ann")
    assert cache.synthesizer("ann", old) is first, "a request that has begun keeps its voice"
    store.add("ann", _file(attached, upstream, sound_file(tone(3.0))))
    new = store.digest("ann") or ""
    assert cache.synthesizer("ann", new) is not first
    assert cache.voices == 1
    with pytest.raises(UnusableVoiceError, match="just replaced"):
        cache.synthesizer("ann", old)
    store.delete("ann")
    with pytest.raises(UnusableVoiceError, match="No such file"):
        VoiceCache(attached, tmp_path).synthesizer("ann", new)


def _with(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: change(tensors[name])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_with("t3.cond_prompt_speech_tokens", lambda tensor: tensor.fill_(6561)), "do not exist"),
        (_with("gen.prompt_token", lambda tensor: tensor[0, :1].fill_(-1)), "do not exist"),
        (_with("gen.prompt_token_len", lambda tensor: tensor.fill_(10**9)), "speech tokens, but states"),
        (_with("gen.embedding", lambda tensor: tensor[0, :1].fill_(float("nan"))), "NaN or infinity"),
        (_with("gen.prompt_feat", lambda tensor: tensor[0, 0, :1].fill_(float("inf"))), "NaN or infinity"),
    ],
)
def test_values_that_would_crash_a_gpu_are_refused(
    attached: Attached,
    made: bytes,
    store: VoiceStore,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], Any],
    word: str,
) -> None:
    record = read_record(attached.prepared.options.weights)
    tensors = {name.removeprefix("english/"): tensor for name, tensor in load(made).items()}
    change(tensors)
    changed = voice_bytes({record.variant: voice_of(tensors)}, {record.variant: record.set_digest}, b"")
    (tmp_path / "bad.safetensors").write_bytes(changed)
    digest = store.digest("bad")
    assert digest is not None, "the HTTP process has no torch and cannot detect this"
    with pytest.raises(UnusableVoiceError, match=word):
        VoiceCache(attached, tmp_path).synthesizer("bad", digest)


def test_a_voice_process_checks_a_clip_again(attached: Attached) -> None:
    config = WorkerConfig(start=attached.prepared.options)
    with pytest.raises(BadInputError, match=r"the clip is 0\.00 s long"):
        asyncio.run(make_voice([config], sound_file(tone(0.001))))
