"""Places: where an image keeps things, and what a process needs of its cache directory. Importing this is cheap."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

from chatterbox_prewarm.errors import BadInputError

#: The places of an image. The cache is the one path that compilers see, the same at bake and at run.
WEIGHTS = Path("/opt/chatterbox-prewarm/weights")
WARM = Path("/opt/chatterbox-prewarm/warm")
CACHE = Path("/var/cache/chatterbox-prewarm")
#: Where voices are that were added at run time; a volume, or there are none.
VOICES = Path("/data/voices")

#: What a bake locks in a cache directory, and a start shares.
BAKE = "bake"

#: Set in every process that loads the model: nothing is fetched at run time, and no bar is drawn into a log.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def model_environment(cache: Path) -> dict[str, str]:
    """What must be set before the model's packages are imported, whatever the warm state holds.

    Raises:
        OSError: the hub clients' marker cannot be written into `cache`.
    """
    return {**_ENVIRONMENT, **_user_environment(cache), "HF_HOME": str(_seed_hub(cache))}


def make_cache(cache: Path) -> None:
    """Make sure that the cache directory exists and that files can be made in it.

    Raises:
        BadInputError: it cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise BadInputError(
            f"the cache directory {cache} cannot be written: {error.strerror or error}",
            next_step="mount a tmpfs or an emptyDir there (it must allow execution), or name another with --cache",
        ) from error


def require_execution(cache: Path) -> None:
    """Make sure that libraries can be loaded from the cache directory.

    Raises:
        BadInputError: its file system is mounted `noexec`.
    """
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        raise BadInputError(
            f"the cache directory {cache} lies on a file system that forbids execution",
            next_step="mount it with `exec`, or name another with --cache",
        )


def _seed_hub(cache: Path) -> Path:
    """A home for hub clients, with the marker that diffusers otherwise writes on import."""
    marker = cache / "hub" / "hub" / "version_diffusers_cache.txt"
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("1", encoding="ascii")
    return cache / "hub"


def _user_environment(cache: Path) -> dict[str, str]:
    """A home and a user name for a UID that has no passwd entry: caches and getpass ask for both."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return {"HOME": str(cache), "USER": "chatterbox", "XDG_CACHE_HOME": str(cache / "xdg")}
    return {}
