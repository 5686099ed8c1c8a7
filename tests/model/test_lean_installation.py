"""Test the wheel with the extras `lean` and `multilingual`, in an environment without upstream's packages."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.weights.variants import MULTILINGUAL
from tests.conftest import ROOT
from tests.helpers.packages import Environment, build_package, copy_checkout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatterbox_prewarm.start.attach import Attached
    from chatterbox_prewarm.weights.variants import Variant

pytestmark = pytest.mark.slow

#: Speaks, and prints the audio, the text tokens of every language, and the packages that are absent.
_PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
from chatterbox_prewarm import load_warmup_cache
warm, weights, multilingual, cache = map(Path, sys.argv[1:])
attached = load_warmup_cache(warm, weights, cache=cache)
speech = attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
from chatterbox_prewarm.model.variants import code_of
from chatterbox_prewarm.weights.variants import MULTILINGUAL
text = code_of(MULTILINGUAL).read_text(multilingual, MULTILINGUAL, frozenset())
ids = {language: list(text.ids(sample, language)) for language, sample in MULTILINGUAL.samples.items()}
absent = [name for name in ("chatterbox", "transformers", "librosa", "numba") if not importlib.util.find_spec(name)]
found = {"pcm": speech.pcm.tolist(), "ids": ids, "absent": absent, "torch": sys.modules["torch"].__file__}
print("JSON" + json.dumps({**found, "misses": attached.metrics.to_dict()["misses"]}))
"""


def test_it_gives_the_same_audio_and_reads_the_texts_of_every_language(
    attached: Attached, baked: Path, mini: Path, checkpoint: Callable[[Variant], Path], tmp_path: Path
) -> None:
    wheel = build_package("wheel", copy_checkout(tmp_path / "checkout"), tmp_path / "wheel")
    lock = ROOT / "build" / "locks" / f"torch-{'.'.join(torch.__version__.split('.')[:2])}-lean.txt"
    environment = Environment(sys.executable, tmp_path / "new")
    environment.install("--no-deps", "--require-hashes", "-r", str(lock))  # the lock leaves out Triton
    environment.install("--no-deps", f"{wheel}[lean,multilingual]")
    multilingual = checkpoint(MULTILINGUAL)
    paths = map(str, (baked, mini, multilingual, tmp_path / "cache"))
    command = [str(tmp_path / "new" / "bin" / "python"), "-I", "-c", _PROGRAM, *paths]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.rpartition("JSON")[2])
    assert found["torch"].startswith(str(tmp_path))
    assert found["absent"] == ["chatterbox", "transformers", "librosa", "numba"]
    assert "conditionals" not in found["misses"]
    spoken = attached.synthesizer.synthesize("Hello, world.", seed=7, max_new_tokens=12)
    assert np.array_equal(found["pcm"], spoken.pcm)
    text = code_of(MULTILINGUAL).read_text(multilingual, MULTILINGUAL, frozenset())
    assert found["ids"] == {name: list(text.ids(sample, name)) for name, sample in MULTILINGUAL.samples.items()}
