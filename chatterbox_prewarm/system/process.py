"""Running a command to its end: logged, and with a clear error when it cannot be started."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import threading
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING

from chatterbox_prewarm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

#: Tells a process of this project who started it, so that it can see whether that one still lives.
PARENT = "CHATTERBOX_PREWARM_PARENT"
#: What interrupts a process of this project, so that it cleans up and ends.
_ENDING = (signal.SIGINT, signal.SIGTERM)
#: Whether what is done now must not be interrupted.
_undisturbed: ContextVar[bool] = ContextVar("undisturbed", default=False)


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    with_stderr: bool = False,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | None = None,
    given: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed; the caller looks at `returncode`.

    Standard error is passed through, so that progress stays visible, or comes with what was printed (`with_stderr`).
    What is large or no text goes to a file: `stdout`, `stderr`. Standard input is ours, or the text `given`.

    Raises:
        EngineError: the program does not exist or ran past `timeout` seconds.
    """
    logger.info("$ %s", shlex.join(command))
    try:
        return subprocess.run(
            list(command),
            env={**(os.environ if env is None else env), PARENT: str(os.getpid())},
            cwd=cwd,
            input=given,
            timeout=timeout,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if with_stderr else stderr,
            text=True,
            check=False,
            start_new_session=_undisturbed.get(),
        )
    except FileNotFoundError as error:
        raise EngineError(f"the program {command[0]!r} is not installed", next_step=f"install {command[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{command[0]!r} did not end within {timeout:.0f} s", next_step="look at what it printed above"
        ) from error


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off until the end.

    For what leaves damage or a remainder when it is half done, and takes no longer than a user waits after Ctrl-C. The
    programs that are started get a session of their own, since a terminal interrupts all that runs in it.
    """
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # nothing interrupts another
        before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in _ENDING}
    token = _undisturbed.set(True)
    try:
        yield
    finally:
        _undisturbed.reset(token)
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
