"""The public Python names: importing them imports no torch, and each is documented with an example."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import chatterbox_prewarm
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
