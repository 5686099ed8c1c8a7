"""The weights step of an image build: fetch (through a cache that survives the step) or synthesize a checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from chatterbox_prewarm.errors import BadInputError, exit_with_code
from chatterbox_prewarm.weights.checkpoints import share_files
from chatterbox_prewarm.weights.variants import DEFAULT_VARIANT, Variant, get_variant

_SECRETS = Path("/run/secrets")
_EPOCH = int(os.environ.get("SOURCE_DATE_EPOCH") or 1735689600)


def main() -> None:
    """`fetch.py CACHE TARGET`, or `fetch.py --synthetic SIZE TARGET`.

    VARIANT has the names of the variants, separated by commas. One checkpoint is written to TARGET itself, several to
    directories there with the names of the variants.
    """
    *source, target = sys.argv[1:]
    names = [name.strip() for name in (os.environ.get("VARIANT") or DEFAULT_VARIANT.name).split(",")]
    places = {name: Path(target) / name if len(names) > 1 else Path(target) for name in names}
    if source[0] == "--synthetic":
        from chatterbox_prewarm.model.synthetic import synthesize

        for name, place in places.items():
            synthesize(place, size=source[1], seed=0, variant=get_variant(name))
    else:
        repositories = {get_variant(name).repository for name in names}
        if os.environ.get("REVISION") and len(repositories) > 1:
            raise BadInputError(
                f"REVISION is a commit of one repository, and the variants have {len(repositories)}: "
                f"{', '.join(sorted(repositories))}",
                next_step="leave REVISION out, or build an image for each repository",
            )
        _prepare_network()
        for name, place in places.items():
            _fetch(Path(source[0]) / name, place, get_variant(name))
    share_files(places)
    for path in Path(target).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o444)
        os.utime(path, (_EPOCH, _EPOCH))  # the same files give the same layer


def _prepare_network() -> None:
    """Use the secrets and the mirror of the build."""
    if (_SECRETS / "ca").is_file():
        os.environ["SSL_CERT_FILE"] = str(_SECRETS / "ca")
    if (_SECRETS / "hf_token").is_file():
        os.environ["HF_TOKEN"] = (_SECRETS / "hf_token").read_text(encoding="utf-8").strip()
    if not os.environ.get("HF_ENDPOINT"):
        os.environ.pop("HF_ENDPOINT", None)  # an empty build argument is not an address


def _fetch(cache: Path, target: Path, variant: Variant) -> None:
    """Fetch a checkpoint into the cache and copy it from there."""
    from chatterbox_prewarm.weights.fetch import fetch
    from chatterbox_prewarm.weights.record import RECORD_NAME

    fetch(cache, variant=variant, revision=os.environ.get("REVISION") or None)
    for name in (*variant.files, RECORD_NAME):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache / name, target / name)


if __name__ == "__main__":
    with exit_with_code():
        main()
