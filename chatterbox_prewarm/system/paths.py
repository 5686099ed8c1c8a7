"""The paths of an image, and the requirements on the cache directory. Importing this module is cheap."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

from chatterbox_prewarm.errors import BadInputError

#: Paths in an image. The cache has the same path at bake and at run time, because compilers store it in their files.
WEIGHTS = Path("/opt/chatterbox-prewarm/weights")
WARM = Path("/opt/chatterbox-prewarm/warm")
CACHE = Path("/var/cache/chatterbox-prewarm")
#: Voices that were added at run time; a volume.
VOICES = Path("/data/voices")

#: The name in the cache directory that a bake locks exclusively and a start shares.
BAKE = "bake"
#: The folders in the cache directory that only a bake uses: for compiled code, bytecode and the stand-in for a GPU.
BAKE_FOLDERS = (COMPILED_FOLDER, BYTECODE_FOLDER, STAND_IN_FOLDER) = ("bake-compiled", "bake-bytecode", "bake-stand-in")

#: Set in every process that loads the model: no downloads at run time, and no progress bars in logs.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
#: How often a thread of GNU OpenMP looks for work before it sleeps, and the variables that decide it. The default of
#: 300,000 times makes two processes on the same two CPUs four times as slow instead of twice. With this number they are
#: 1.9 times as slow, and a process that has the CPUs for itself is 1.04 times as slow (docs/benchmarks.md).
_SPIN_COUNT = "1000"
_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def as_path(path: object, what: str) -> Path:
    """Return a path that a caller of the Python API gave.

    Args:
        path: the argument.
        what: its meaning, for the error, such as "the warm state".

    Raises:
        BadInputError: it is neither text nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise BadInputError(f"{what} is {path!r}", next_step="give a path: text, or a pathlib.Path")
    return Path(path)


def model_environment(cache: Path) -> dict[str, str]:
    """Return the environment variables to set before the model's packages are imported, with or without a warm state.

    Raises:
        OSError: `cache` cannot be written.
    """
    return {**_ENVIRONMENT, **waiting_environment(), **_user_environment(cache), "HF_HOME": str(_seed_hub(cache))}


def waiting_environment() -> dict[str, str]:
    """Return the variable that makes waiting threads sleep early, unless the user has decided."""
    return {} if any(name in os.environ for name in _WAITING) else {_WAITING[0]: _SPIN_COUNT}


def make_cache(cache: Path) -> None:
    """Create the cache directory, and check that it is writable.

    Raises:
        BadInputError: it is not writable.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise BadInputError(
            f"the cache directory {cache} cannot be written: {error.strerror or error}",
            next_step="mount a tmpfs or an emptyDir there that allows execution, or choose another cache path",
        ) from error


def require_execution(cache: Path) -> None:
    """Check that libraries can be loaded from the cache directory.

    Raises:
        BadInputError: its file system is mounted `noexec`.
    """
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        raise BadInputError(
            f"the cache directory {cache} is on a file system that forbids execution",
            next_step="mount it with `exec`, or choose another cache path",
        )


def _seed_hub(cache: Path) -> Path:
    """Make a home directory for hub clients, with the marker file that diffusers writes on import if it is missing."""
    marker = cache / "hub" / "hub" / "version_diffusers_cache.txt"
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("1", encoding="ascii")
    return cache / "hub"


def _user_environment(cache: Path) -> dict[str, str]:
    """Return a home directory and a user name for a UID without a passwd entry. Caches and getpass need both."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return {"HOME": str(cache), "USER": "chatterbox", "XDG_CACHE_HOME": str(cache / "xdg")}
    return {}
