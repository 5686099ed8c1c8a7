"""Test the environment of processes that run the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.system.paths import model_environment

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what `make test` and users set."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)


def test_threads_that_wait_soon_sleep(tmp_path: Path) -> None:
    assert model_environment(tmp_path)["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")])
def test_how_threads_wait_can_be_set(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert "GOMP_SPINCOUNT" not in model_environment(tmp_path)
