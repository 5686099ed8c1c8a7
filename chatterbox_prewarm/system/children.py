"""Child processes of this project: their environment, and how they end with their parent. Cheap to import."""

from __future__ import annotations

import os
import signal

#: The process id of the parent, set for child processes of this project so that they end with their parent.
PARENT = "CHATTERBOX_PREWARM_PARENT"
#: The token that requests to a server need. Child processes do not get it.
TOKEN = "CHATTERBOX_PREWARM_TOKEN"  # noqa: S105 - the name of a variable

_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """Return the environment for a child of this process."""
    return {**{name: value for name, value in os.environ.items() if name != TOKEN}, PARENT: str(os.getpid())}


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however the parent ends."""
    end_with_parent(signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)  # the parent ended before the call above


def end_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends."""
    import ctypes  # here, because the process that starts a worker does not need it

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
