"""The errors of this project. Each kind has an exit code.

Every message gives the expected value, the actual value, and the next step for the user.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TYPE_CHECKING

from chatterbox_prewarm.redaction import print_traceback, redact

if TYPE_CHECKING:
    from collections.abc import Iterator


class PrewarmError(Exception):
    """Base of every error that a user can cause or fix.

    Args:
        message: the problem, with the expected and the actual value.
        next_step: advice for the user, as a sentence or a command.
    """

    exit_code = 70

    def __init__(self, message: str, *, next_step: str) -> None:
        # A message can quote a registry, a proxy or the user.
        self.message, self.next_step = redact(message), redact(next_step)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.next_step}"


class WeightsError(PrewarmError):
    """The weights are missing or truncated, have a wrong shape or digest, or are a pickle instead of safetensors."""

    exit_code = 10


class FingerprintMismatchError(PrewarmError):
    """The warm state was baked for another machine or other software, and the policy is `require`."""

    exit_code = 11


class IntegrityError(PrewarmError):
    """A file of the warm state differs from the manifest, or is not listed in it."""

    exit_code = 12


class NotWarmError(PrewarmError):
    """A start had a miss: it compiled, fetched or wrote something that should have been baked."""

    exit_code = 13


class EngineError(PrewarmError):
    """A container engine or a registry failed."""

    exit_code = 14


class ModelError(PrewarmError):
    """The model could not be built, or produced no speech."""

    exit_code = 15


class BadInputError(PrewarmError):
    """An input cannot be used: a text, a voice, a path or a port."""

    exit_code = 16


#: The exit codes of all kinds of errors. 70, the code of the base class, means a bug of this program.
EXIT_CODES = frozenset({PrewarmError.exit_code, *(kind.exit_code for kind in PrewarmError.__subclasses__())})


#: The extra that installs a package, by the name of its module. All others belong to the extra `model`.
_EXTRAS = {
    **dict.fromkeys(("cryptography", "cyclonedx", "model_signing", "packageurl"), "trust"),
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
}


def error_with_code(exit_code: int, message: str, next_step: str) -> PrewarmError:
    """Rebuild an error that another process of this project reported."""
    for kind in PrewarmError.__subclasses__():
        if kind.exit_code == exit_code:
            return kind(message, next_step=next_step)
    return PrewarmError(message, next_step=next_step)


@contextlib.contextmanager
def exit_with_code() -> Iterator[None]:
    """Turn an error into a message and an exit code, for a program that is not a command."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the last line of defence
        found = as_prewarm_error(error)
        if found.exit_code == PrewarmError.exit_code:  # a bug of this program, which has no option --debug
            print_traceback()
        print(f"error: {found}", file=sys.stderr)
        sys.exit(found.exit_code)


def as_prewarm_error(error: Exception) -> PrewarmError:
    """Convert any error: into a missing package, an error of the operating system, or a bug of this program."""
    if isinstance(error, PrewarmError):
        return error
    if isinstance(error, ImportError):
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "model")
        return ModelError(
            f"a package is missing: {error}",
            next_step=f"install the {extra} extra: pip install 'chatterbox-prewarm[{extra}]'",
        )
    if is_out_of_threads(error):
        return ModelError(
            f"the system allows no further thread or process: {first_line(error)}",
            next_step="allow more of them (a container's limit on processes, or ulimit -u), or use fewer --threads",
        )
    if isinstance(error, OSError):
        return from_os_error(error, "reading or writing a file")
    if is_out_of_memory(error):
        return ModelError(
            f"the process ran out of memory: {first_line(error)}",
            next_step="give it more memory, or limit the length of the speech",
        )
    return PrewarmError(
        f"a bug of this program: {type(error).__name__}: {error}",
        next_step="run it again with --debug and report its output",
    )


#: How Python's and C++'s threads report that none can be started.
_OUT_OF_THREADS = ("can't start new thread", os.strerror(errno.EAGAIN))
#: How PyTorch's CPU allocator, oneDNN, and PyTorch's mapping of a file report that memory ran out.
_OUT_OF_MEMORY = ("can't allocate memory", "could not create a", os.strerror(errno.ENOMEM))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation on the CPU or on a GPU failed."""
    torch = sys.modules.get("torch")  # before torch is imported, it cannot have raised an error
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


def is_out_of_threads(error: BaseException) -> bool:
    """Return whether the system refused to start a thread or a process."""
    if isinstance(error, OSError):
        return error.errno == errno.EAGAIN
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_THREADS)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, without the pages that compilers add."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def from_os_error(error: OSError, doing: str) -> BadInputError:
    """Convert an error of the operating system into one that says what to do.

    Args:
        error: the error of the operating system.
        doing: the operation in words, such as "writing the warm state".
    """
    if "No usable temporary directory" in str(error):  # the module tempfile; its message lists the directories
        return BadInputError(
            f"{doing}: {error.strerror}",
            next_step="make one of them writable, or set TMPDIR; in a container, mount a tmpfs or an emptyDir at /tmp",
        )
    steps = {
        errno.EMFILE: "allow this process more open files: ulimit -n, or the limit of the container",
        errno.ENFILE: "close files of other programs: the system has too many open files",
        errno.ENOSPC: "free some space on that file system, or name another path",
        errno.EDQUOT: "free some of your quota, or name another path",
        errno.EACCES: "make the path accessible to this user, or name another path",
        errno.EPERM: "make the path accessible to this user, or name another path",
        errno.EROFS: "name a writable path; in a container, mount a tmpfs or an emptyDir there",
    }
    step = steps.get(error.errno or 0, "check the path and try again")
    where = f" ({error.filename})" if error.filename else ""
    return BadInputError(f"{doing}: {error.strerror or error}{where}", next_step=step)
