"""The version of this package, and the commit of its sources."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

__version__ = "0.1.0"

#: The file with the commit in a wheel, an sdist and an image. A checkout does not have it.
COMMIT_FILE = "commit.txt"
_COMMIT = re.compile(r"[0-9a-f]{40}(\+changes)?")


def commit() -> str:
    """Return the commit of the sources of this package, with `+changes` if they differ from it; "" if it is unknown.

    It was written when the package or the image was built. Without that, it is the commit of the checkout that has this
    file, and not of another repository that happens to be above it.
    """
    package = Path(__file__).resolve().parent
    try:
        written = (package / COMMIT_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return commit_of(package.parent)
    return written if _COMMIT.fullmatch(written) else ""


def commit_of(checkout: Path) -> str:
    """Return the commit of a checkout; "" if the folder is not the root of one, or git is missing or fails."""
    if not (checkout / ".git").exists():
        return ""
    found = _git(checkout, "rev-parse", "HEAD")
    if not _COMMIT.fullmatch(found):
        return ""
    return found + ("+changes" if _git(checkout, "status", "--porcelain", "--untracked-files=no") else "")


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],  # noqa: S607 - git of the user
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe() -> str:
    """Return the version, with the commit if it is known."""
    found = commit()
    return f"{__version__} (commit {found})" if found else __version__
