"""Build the images that tests begin with, so that the engine has their layers: `python -m tests.image.prebuild`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from chatterbox_prewarm.bench.image import build, copy_context, docker
from chatterbox_prewarm.process import run
from tests.conftest import ROOT
from tests.image.conftest import COMPILED, SYNTHETIC

TAG = "chatterbox-prewarm-prebuilt:warm"


def main() -> None:
    """Build each, one after the other, and drop the names: the builder's cache is what counts."""
    with tempfile.TemporaryDirectory() as scratch:
        context = copy_context(ROOT, Path(scratch) / "context")
        for arguments in (SYNTHETIC, (*SYNTHETIC, *COMPILED)):
            build(context, TAG, arguments)
    run([docker(), "rmi", "--force", TAG])


if __name__ == "__main__":
    main()
