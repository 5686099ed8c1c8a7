"""The command that starts a proof process."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def proof_command(warm: Path, weights: Path, cache: Path) -> list[str]:
    """The command that runs `trial` in a fresh interpreter."""
    arguments = json.dumps({"warm": str(warm), "weights": str(weights), "cache": str(cache)})
    return [sys.executable, "-m", "chatterbox_prewarm.proof.proof_process", arguments]
