"""Fixtures of the tests of warm states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers.signed_state import SignedState

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def signed(tmp_path: Path) -> SignedState:
    """Make a signed state."""
    return SignedState(tmp_path)
