"""One error tree; each leaf has the exit code that the command line ends with.

Every message names the thing, what was expected, what was found, and ends with what to do next.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class PrewarmError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        message: what is wrong, with the expected and the found value.
        next_step: what to do about it, as a sentence or a command.
    """

    exit_code = 70

    def __init__(self, message: str, *, next_step: str) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.next_step}"


class WeightsError(PrewarmError):
    """The weights are missing, truncated, of a wrong shape or digest, or pickled where safetensors belong."""

    exit_code = 10


class FingerprintMismatchError(PrewarmError):
    """The warm state was baked for another machine or other software, and the policy is `require`."""

    exit_code = 11


class IntegrityError(PrewarmError):
    """A file of the warm state is not what the manifest says, or is not in it."""

    exit_code = 12


class NotWarmError(PrewarmError):
    """A proof saw a miss: something was compiled, fetched or written that should have been baked."""

    exit_code = 13


class EngineError(PrewarmError):
    """A container engine or a registry failed."""

    exit_code = 14


class ModelError(PrewarmError):
    """The model could not be built, or produced no speech."""

    exit_code = 15


class BadInputError(PrewarmError):
    """Text, voice, path, port or place to write that cannot be used."""

    exit_code = 16


#: Of every kind of error; 70, the base's own, is a fault of this program.
EXIT_CODES = frozenset({PrewarmError.exit_code, *(kind.exit_code for kind in PrewarmError.__subclasses__())})


#: What the extra `trust` installs, by the names that are imported.
_TRUST = frozenset({"cryptography", "cyclonedx", "model_signing", "packageurl"})


def error_with_code(exit_code: int, message: str, next_step: str) -> PrewarmError:
    """Rebuild an error that another process of this project reported."""
    for kind in PrewarmError.__subclasses__():
        if kind.exit_code == exit_code:
            return kind(message, next_step=next_step)
    return PrewarmError(message, next_step=next_step)


@contextlib.contextmanager
def exit_with_code() -> Iterator[None]:
    """End a program that has no command line of its own as the command line ends: the message, then the exit code."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the last line of defence
        found = as_prewarm_error(error)
        if found.exit_code == PrewarmError.exit_code:  # a fault of this program; there is no --debug to ask for
            traceback.print_exc()
        print(f"error: {found}", file=sys.stderr)
        sys.exit(found.exit_code)


def as_prewarm_error(error: Exception) -> PrewarmError:
    """Put any error into the tree: what is not in it is the system's, a missing package, or a fault of this program."""
    if isinstance(error, PrewarmError):
        return error
    if isinstance(error, ImportError):
        extra = "trust" if (error.name or "").partition(".")[0] in _TRUST else "model"
        return ModelError(
            f"a package is missing: {error}",
            next_step=f"install the {extra} extra: pip install 'chatterbox-prewarm[{extra}]'",
        )
    if isinstance(error, OSError):
        return from_os_error(error, "reading or writing a file")
    return PrewarmError(
        f"a fault of this program: {type(error).__name__}: {error}",
        next_step="run it again with --debug and report what it prints",
    )


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that compilers add."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def from_os_error(error: OSError, doing: str) -> BadInputError:
    """Turn an operating-system error at the edge of an operation into one that says what to do.

    Args:
        error: what the system said.
        doing: the operation in words, as in "writing the warm state".
    """
    steps = {
        errno.ENOSPC: "free some space on that file system, or name another place",
        errno.EDQUOT: "free some of your quota, or name another place",
        errno.EACCES: "make the path accessible to this user, or name another place",
        errno.EPERM: "make the path accessible to this user, or name another place",
        errno.EROFS: "name a writable place; in a container, mount a tmpfs or an emptyDir there",
    }
    step = steps.get(error.errno or 0, "check the path and try again")
    where = f" ({error.filename})" if error.filename else ""
    return BadInputError(f"{doing}: {error.strerror or error}{where}", next_step=step)
