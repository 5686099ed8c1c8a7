"""The bake step of an image build. It is not a command, so that a change of the commands bakes nothing."""

from __future__ import annotations

import argparse
import logging
import sys

from chatterbox_prewarm.bake.bake import bake
from chatterbox_prewarm.bake.options import BakeOptions
from chatterbox_prewarm.bake.several import bake_several
from chatterbox_prewarm.errors import exit_with_code
from chatterbox_prewarm.model.profiles import default_execution
from chatterbox_prewarm.state.state import state_key
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS
from chatterbox_prewarm.weights.checkpoints import checkpoints_in


def main() -> None:
    """Bake at the places of an image: one state, or one for each model and target."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--levels", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--t3-dtype", required=True)
    parser.add_argument("--target", default="")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    new_state = WARM / "new"
    targets = options.target.split(",") if options.target else []
    several = bool(targets) or len(checkpoints_in(WEIGHTS)) > 1
    bake_options = BakeOptions(
        weights=WEIGHTS,
        warm=WARM if several else new_state,
        cache=CACHE,
        device=options.device,
        execution=default_execution(options.device, profile=options.profile, t3_dtype=options.t3_dtype),
        levels=tuple(int(level) for level in options.levels.split(",")),
    )
    if several:
        bake_several(bake_options, targets, progress=_say)
        return
    manifest = bake(bake_options, progress=_say)
    new_state.rename(WARM / state_key(manifest))  # other states can be added next to it
    (WARM / f".{new_state.name}.lock").unlink()
    for family in manifest.families:
        print(f"{family.name}: {family.size} bytes, {family.seconds_saved:.1f} s saved", file=sys.stderr)


def _say(line: str) -> None:
    print(f"bake: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    with exit_with_code():
        main()
