"""The public Python names: importing them imports no torch, and each is documented with an example."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import Any

import pytest

import chatterbox_prewarm
from chatterbox_prewarm.errors import BadInputError
from tests.conftest import ROOT


def test_import_of_all_names_imports_neither_torch_nor_numba() -> None:
    names = "{'torch', 'numba', 'chatterbox'}"
    program = f"from chatterbox_prewarm import *\nimport sys\nprint(sorted({names} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.strip() == "[]"


def test_dir_shows_the_names() -> None:
    assert set(chatterbox_prewarm.__all__) <= set(dir(chatterbox_prewarm))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = chatterbox_prewarm.no_such_name


@pytest.mark.parametrize("name", chatterbox_prewarm.__all__)
def test_each_name_is_documented_with_an_example(name: str) -> None:
    documentation = inspect.getdoc(getattr(chatterbox_prewarm, name))
    assert documentation is not None
    assert "Example:\n    >>> " in documentation


def test_the_reference_is_up_to_date() -> None:
    """The program runs in a fresh process, because a loaded model changes the base of `PrewarmedChatterbox`."""
    program = [sys.executable, "docs/api.py"]
    printed = subprocess.run(program, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == printed, "run: python docs/api.py > docs/api.md"


@pytest.mark.parametrize(
    ("name", "arguments", "named", "message"),
    [
        ("load_warmup_cache", (3,), {}, "the warm state is 3"),
        ("load_warmup_cache", ("warm",), {"weights": 3}, "the checkpoint is 3"),
        ("load_warmup_cache", ("warm", "weights"), {"cache": 3}, "the cache directory is 3"),
        ("from_pretrained_with_warmup", (), {"weights": 3}, "the checkpoint is 3"),
        ("from_pretrained_with_warmup", (3,), {}, "there is no device '3'"),
        ("ChatterboxServer", (3,), {}, "there is no device '3'"),
        ("ChatterboxServer", ("cpu",), {"warm": 3}, "the warm state is 3"),
        ("ChatterboxServer", ("cpu",), {"voices": {"ann": 3}}, "the clip of the voice ann is 3"),
        ("warm_up_multi_gpu", ([0, 1],), {}, "there is no device '0'"),
        ("ChatterboxWarmupStrategy", (), {"levels": 3}, "the warm-up levels 3 are not among"),
        ("run_warmup_benchmarks", (3,), {}, "the folder for the results is 3"),
        ("run_warmup_benchmarks", ("report",), {"weights": 3}, "the checkpoint is 3"),
        (
            "generate_warmup_report",
            ({"plan": {}, "steps": {}, "complete": True}, 3),
            {},
            "the folder for the page is 3",
        ),
        ("benchmark_warmup_effectiveness", (), {"weights": 3}, "the checkpoint is 3"),
    ],
)
def test_an_argument_of_a_wrong_type_is_refused(
    name: str, arguments: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=re.escape(message)) as refused:
        getattr(chatterbox_prewarm, name)(*arguments, **named)
    assert "--" not in refused.value.next_step, "advice for Python, not for the command line"
