"""Test that families load what they saved: conditionals bit by bit, signal constants equal to computed ones."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchaudio

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.families.conditionals import load_voice, save_voice
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.voices import prepare_voice
from chatterbox_prewarm.state.state import State

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def fox(upstream: Any, clip: Path) -> Any:
    return prepare_voice(upstream, clip)


def _tensors(voice: Any) -> dict[str, torch.Tensor]:
    named = {f"t3.{key}": value for key, value in vars(voice.t3).items()}
    named |= {f"gen.{key}": value for key, value in voice.gen.items()}
    return {key: value for key, value in named.items() if torch.is_tensor(value)}


def test_conditionals_are_equal_after_a_round_trip(fox: Any, tmp_path: Path) -> None:
    save_voice(fox, tmp_path / "a.safetensors")
    loaded = load_voice(tmp_path / "a.safetensors")
    save_voice(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert _tensors(fox).keys() == _tensors(loaded).keys()
    for key, tensor in _tensors(fox).items():
        assert _tensors(loaded)[key].dtype == tensor.dtype, key
        assert torch.equal(_tensors(loaded)[key], tensor), key


def test_conditionals_have_no_autograd_graph(fox: Any) -> None:
    assert len(_tensors(fox)) == 7
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in _tensors(fox).values())


def test_conditionals_have_the_documented_shapes(fox: Any) -> None:
    tensors = _tensors(fox)
    assert tensors["t3.speaker_emb"].shape == (1, 256)
    assert tensors["t3.cond_prompt_speech_tokens"].dtype == torch.int64
    assert tensors["t3.cond_prompt_speech_tokens"].shape[1] <= 150
    prompt = tensors["gen.prompt_token"].shape[1]
    assert tensors["gen.prompt_feat"].shape in {(1, 2 * prompt, 80), (1, 2 * prompt + 1, 80)}
    assert tensors["gen.embedding"].shape == (1, 192)


def test_preparing_a_voice_does_not_change_the_voice_of_the_model(upstream: Any, fox: Any) -> None:
    assert fox is not None
    assert upstream.conds is None


def test_baked_voice_equals_the_voice_computed_at_run_time(baked: Path, fox: Any) -> None:
    voice = load_voice(baked / "conditionals" / "fox.safetensors")
    for key, tensor in _tensors(fox).items():
        assert torch.equal(_tensors(voice)[key], tensor), key


def test_baked_state_lists_all_voices_and_the_digest_of_the_weights(baked: Path) -> None:
    manifest = State.read(baked).manifest
    assert manifest.voices == (DEFAULT_VOICE, "fox")
    family = manifest.family("conditionals")
    assert family is not None
    assert family.requires["weights"] == manifest.weights.set_digest


def test_baked_signal_constants_equal_computed_ones(baked: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(baked / "signal" / "constants.safetensors")
    configs = json.loads((baked / "signal" / "resamplers.json").read_text())
    assert "24000_16000" in configs
    computed = torchaudio.transforms.Resample(24_000, 16_000)
    assert torch.equal(tensors["resampler.24000_16000"], computed.kernel)
    assert configs["24000_16000"]["width"] == computed.width
    librosa: Any = importlib.import_module("librosa")
    basis = librosa.filters.mel(sr=24_000, n_fft=1920, n_mels=80, fmin=0, fmax=8000)
    assert torch.equal(tensors["mel.8000"], torch.from_numpy(basis).float())
    assert torch.equal(tensors["window.hann"], torch.hann_window(1920))


def test_rebuilt_resampler_equals_the_one_of_torchaudio() -> None:
    from chatterbox_prewarm.families.signal_constants import _resampler

    computed = torchaudio.transforms.Resample(24_000, 16_000)
    config = {"orig_freq": 24_000, "new_freq": 16_000, "gcd": computed.gcd, "width": computed.width}
    rebuilt = _resampler(config, computed.kernel)
    wave = torch.randn(1, 24_000)
    assert torch.equal(rebuilt(wave), computed(wave))


def _write(path: Path, samples: Any, rate: int) -> Path:
    import soundfile

    soundfile.write(path, samples, rate)
    return path


def test_unusable_clips_are_refused(tmp_path: Path) -> None:
    import numpy as np

    from chatterbox_prewarm.model.clips import check_clip

    tone = 0.3 * np.sin(np.arange(48_000) / 20)
    bad = {
        "does not exist": tmp_path / "missing.wav",
        "0.00 s long": _write(tmp_path / "empty.wav", np.zeros(0), 24_000),
        "0.50 s long": _write(tmp_path / "short.wav", tone[:12_000], 24_000),
        "2 channels": _write(tmp_path / "stereo.wav", np.stack([tone, tone], axis=1), 24_000),
        "sampled at 8000 Hz": _write(tmp_path / "narrow.wav", tone, 8_000),
        "is silent": _write(tmp_path / "silent.wav", np.zeros(48_000), 24_000),
        "NaN or infinity": _write(tmp_path / "nan.wav", np.full(48_000, np.nan, dtype=np.float32), 24_000),
    }
    (tmp_path / "text.wav").write_text("this is not audio")
    bad["is not audio"] = tmp_path / "text.wav"
    whole = _write(tmp_path / "whole.flac", tone, 24_000).read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    bad["can be read|s long"] = tmp_path / "half.flac"
    for word, path in bad.items():
        if word == "NaN or infinity":
            import soundfile

            soundfile.write(path, np.full(48_000, np.nan, dtype=np.float32), 24_000, subtype="FLOAT")
        with pytest.raises(BadInputError, match=word) as caught:
            check_clip(path, name="v")
        assert caught.value.exit_code == 16
    check_clip(_write(tmp_path / "good.wav", tone, 24_000), name="v")


def test_baked_constant_is_a_hit_and_computed_constant_is_one_miss(baked: Path, mini: Path) -> None:
    """Run in a separate process, because the tables are module state of upstream."""
    cache = baked.parent / "signal-cache"
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(baked), str(mini), str(cache)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["loaded"] > 0
    assert seen["before"] == [0, 0]
    hits, misses = seen["baked clip"]
    assert hits >= 3, "a resampler, a mel filter bank of S3Gen and one of the voice encoder"
    assert misses == 0
    assert seen["other rate"][1] == 2, "from 44.1 kHz to S3Gen's rate and to the tokenizer's"
    assert seen["other rate again"][1] == 2


_COUNT = """
import json, sys
from pathlib import Path
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.options import StartOptions
from chatterbox_prewarm.start.prepare import prepare
warm, weights, cache = map(Path, sys.argv[1:4])
options = StartOptions(warm=warm, weights=weights, cache=cache, policy="require")
attached = attach(prepare(options))
from chatterbox_prewarm.start.upstream import attach_upstream
metrics, model = attached.metrics, attach_upstream(attached.prepared, lean=attached.synthesizer.model)
seen = {"loaded": metrics.loaded["signal"]}
count = lambda: [metrics.hits["signal"], metrics.misses["signal"]]
seen["before"] = count()
from chatterbox_prewarm.model.voices import prepare_voice
from chatterbox_prewarm.model.reference_clip import reference_audio, reference_clip
with reference_clip() as clip:
    prepare_voice(model, clip)
seen["baked clip"] = count()
for name in ("other rate", "other rate again"):
    model.s3gen.embed_ref(reference_audio(1.0, 44_100), 44_100, device=model.device)
    seen[name] = count()
print(json.dumps(seen))
"""
