"""Test the persistent backend: repeated calls build one wrapper and leave no hook behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from chatterbox.models.t3 import T3
from chatterbox.models.t3 import t3 as t3_module
from chatterbox.models.t3.modules.cond_enc import T3Cond

from chatterbox_prewarm.model.t3_backend import PersistentT3, keep_backend
from chatterbox_prewarm.model.upstream import make_t3
from chatterbox_prewarm.weights.variants import ENGLISH, MULTILINGUAL

CALLS = 12


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often upstream's wrapper is built."""
    counted = [0]

    class Counting(t3_module.T3HuggingfaceBackend):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            counted[0] += 1
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(t3_module, "T3HuggingfaceBackend", Counting)
    return counted


@pytest.fixture(scope="module")
def english_t3() -> T3:
    torch.manual_seed(0)
    return make_t3(ENGLISH, 1).eval()


@pytest.fixture(scope="module")
def multilingual_t3() -> T3:
    """Fourteen layers, because the alignment analyzer adds a hook to the thirteenth."""
    torch.manual_seed(0)
    return make_t3(MULTILINGUAL, 14).eval()


def _speak(t3: T3, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    text = torch.tensor([[t3.hp.start_text_token, 5, 6, 7, t3.hp.stop_text_token]] * 2)
    cond = T3Cond(
        speaker_emb=torch.ones(1, 256),
        cond_prompt_speech_tokens=torch.zeros(1, 150, dtype=torch.long),
        emotion_adv=0.5 * torch.ones(1, 1, 1),
    )
    tokens: torch.Tensor = t3.inference(t3_cond=cond, text_tokens=text, max_new_tokens=2)
    return tokens


def _hooks(t3: T3) -> int:
    return sum(len(module._forward_hooks) for module in t3.modules())


def test_upstream_builds_a_wrapper_for_every_call(english_t3: T3, builds: list[int]) -> None:
    """This is the bug that `keep_backend` fixes. If upstream fixes it, this test fails and `keep_backend` can go."""
    for _ in range(3):
        _speak(english_t3)
    assert builds == [3]


def test_repeated_calls_build_one_wrapper(english_t3: T3, builds: list[int]) -> None:
    expected = _speak(english_t3)
    hooks = _hooks(english_t3)
    builds[0] = 0
    del english_t3.patched_model
    keep_backend(english_t3)
    results = [_speak(english_t3) for _ in range(CALLS)]
    assert builds == [1]
    assert _hooks(english_t3) == hooks, "transformers registers its own hooks once, and no others are added"
    assert all(torch.equal(result, expected) for result in results)


def test_second_call_of_keep_backend_changes_nothing(english_t3: T3) -> None:
    keep_backend(english_t3)
    keep_backend(english_t3)
    assert type(english_t3) is PersistentT3


def _upstream_hooks_after(t3: T3, calls: int) -> int:
    for _ in range(calls):
        _speak(t3)
    return _hooks(t3)


@pytest.mark.slow
def test_multilingual_model_keeps_its_hooks_and_its_attention(multilingual_t3: T3, builds: list[int]) -> None:
    config = multilingual_t3.tfmr.config
    attention = (config._attn_implementation, config.output_attentions)
    first_call = _upstream_hooks_after(multilingual_t3, 1)
    assert _upstream_hooks_after(multilingual_t3, 2) == first_call + 6, "upstream leaves three hooks per call"

    keep_backend(multilingual_t3)
    config._attn_implementation, config.output_attentions = attention
    builds[0] = 0
    first = _speak(multilingual_t3)
    hooks = _hooks(multilingual_t3)
    assert hooks == first_call - 3, "only the hooks of transformers remain"
    later = [_speak(multilingual_t3) for _ in range(CALLS - 1)]
    assert _hooks(multilingual_t3) == hooks
    assert (config._attn_implementation, config.output_attentions) == attention
    assert all(torch.equal(result, first) for result in later)
    assert builds == [CALLS], "the analyzer belongs to one utterance"


#: Imports the backend as with upstream's main branch, which no longer has the analyzer.
_WITHOUT_ANALYZER = """
import importlib.machinery, sys
ANALYZER = "chatterbox.models.t3.inference.alignment_stream_analyzer"
LINE = "from .inference.alignment_stream_analyzer import AlignmentStreamAnalyzer"

class WithoutLine(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        source = self.get_data(self.path).decode()
        assert LINE in source
        return compile(source.replace(LINE, ""), self.path, "exec")

class MainBranch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == ANALYZER:
            raise ModuleNotFoundError(name)
        spec = None
        if name == "chatterbox.models.t3.t3":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            spec.loader = WithoutLine(name, spec.origin)
        return spec

sys.meta_path.insert(0, MainBranch)
from chatterbox_prewarm.model.chatterbox_imports import import_chatterbox
import_chatterbox()
from chatterbox_prewarm.model.t3_backend import PersistentT3, keep_backend
from chatterbox_prewarm.model.upstream import make_t3
from chatterbox_prewarm.weights.variants import ENGLISH
t3 = make_t3(ENGLISH, 1)
keep_backend(t3)
assert isinstance(t3, PersistentT3)
assert ANALYZER not in sys.modules
"""


def test_the_backend_needs_no_module_that_upstreams_main_branch_lacks() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _WITHOUT_ANALYZER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
