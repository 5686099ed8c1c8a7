"""On a GPU: a captured step draws what the same step draws uncaptured, and a synthesis does not wait for the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.fidelity import text_tokens
from chatterbox_prewarm.model.clips import DEFAULT_VOICE
from chatterbox_prewarm.model.regions.executors import eager
from chatterbox_prewarm.model.regions.pipeline import bound
from chatterbox_prewarm.model.regions.t3 import SpeechTokens
from chatterbox_prewarm.model.sampling import Sampling
from chatterbox_prewarm.start.attach import attach
from chatterbox_prewarm.start.prepare import prepare
from tests.conftest import run_cli

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

GREEDY = Sampling(min_p=1.0)
TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "mini"
    made = run_cli("weights", "synthesize", directory, "--size", "mini")
    assert made.returncode == 0, made.stderr
    return directory


@pytest.fixture(scope="module")
def attached(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Attached:
    cache = tmp_path_factory.mktemp("cache")
    return attach(prepare(cache / "none", mini, cache=cache, device="cuda", policy="off"))


@pytest.fixture
def plain(attached: Attached) -> SpeechTokens:
    return SpeechTokens(attached.synthesizer.model.t3, eager)


@pytest.fixture
def captured(attached: Attached) -> SpeechTokens:
    return SpeechTokens(attached.synthesizer.model.t3, eager, graphs=True)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raises where torch would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def draw(decoder: SpeechTokens, attached: Attached, sampling: Sampling, count: int, text: str = TEXT) -> list[int]:
    synthesizer = attached.synthesizer
    torch.manual_seed(3)
    tokens: list[int] = decoder(
        synthesizer.voices[DEFAULT_VOICE].t3,
        text_tokens(synthesizer.model, text),
        sampling=sampling,
        max_new_tokens=count,
    ).tolist()
    return tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), Sampling(top_p=0.8)], ids=str)
def test_a_graph_draws_what_the_step_draws(
    sampling: Sampling, attached: Attached, plain: SpeechTokens, captured: SpeechTokens
) -> None:
    assert draw(captured, attached, sampling, 60) == draw(plain, attached, sampling, 60)
    assert captured.capture_seconds > 0


def test_settings_are_live_in_a_graph(attached: Attached, plain: SpeechTokens, captured: SpeechTokens) -> None:
    for sampling in (GREEDY, Sampling(temperature=2.0, cfg_weight=1.0), Sampling(repetition_penalty=2.0), GREEDY):
        assert draw(captured, attached, sampling, 30) == draw(plain, attached, sampling, 30), sampling


def test_a_longer_sequence_takes_a_larger_cache_and_a_short_one_is_right_after_it(
    attached: Attached, plain: SpeechTokens, captured: SpeechTokens
) -> None:
    short = draw(plain, attached, GREEDY, 30)
    assert draw(captured, attached, GREEDY, 30) == short
    assert draw(captured, attached, GREEDY, 1400)[:30] == short
    assert draw(captured, attached, GREEDY, 30) == short


def test_a_capture_leaves_the_generator_as_it_was(attached: Attached, captured: SpeechTokens) -> None:
    torch.manual_seed(5)
    before = torch.cuda.get_rng_state()
    captured._state(100, nucleus=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert captured.capture_seconds > 0
    assert attached.synthesizer.voices


@pytest.mark.usefixtures("no_waiting")
def test_s3gen_does_not_wait_for_the_host(attached: Attached) -> None:
    stages = bound(attached.synthesizer.model)
    tokens = torch.arange(40, device="cuda")
    sound: Any = stages.vocoder(stages.flow(tokens, attached.synthesizer.voices[DEFAULT_VOICE].gen))
    assert sound.is_cuda


def test_what_is_baked_on_a_gpu_is_proven_there(mini: Path, tmp_path: Path) -> None:
    places = ("--weights", mini, "--warm", tmp_path / "warm")
    baked = run_cli("bake", *places, "--cache", tmp_path / "cache", "--device", "cuda", "--levels", "1")
    assert baked.returncode == 0, baked.stderr
    proven = run_cli("prove", "--here", *places, "--cache", tmp_path / "cache")
    failed = [line for line in proven.stdout.splitlines() if line.startswith("FAIL")]
    # Where this runs, the tests may be the super-user's and on a network: that is not what is to be seen here.
    assert all("super-user" in line or "network interface" in line or "read-only" in line for line in failed), failed
    assert "ok   aot was used" in proven.stdout
