"""Run external commands: log each one, and raise a clear error if it cannot be started."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.redaction import redact
from chatterbox_prewarm.system.children import PARENT
from chatterbox_prewarm.system.progress import detail, receive_record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

#: Signals that interrupt a process, which then cleans up and ends.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
#: Whether interrupts are deferred at present.
_deferred: ContextVar[bool] = ContextVar("deferred", default=False)
#: Number of lines of a program's standard error that are printed if it fails.
_KEPT_LINES = 200
#: Seconds to wait for the last lines of a program. A process that it left behind can keep the pipe open.
_LAST_LINES_SECONDS = 2.0


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    follow: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its standard output as text. The caller checks `returncode`.

    Standard error goes to the log, at the level DEBUG. If the command fails, its last lines are printed.

    Args:
        command: program and arguments.
        env: the environment; by default the parent's.
        timeout: in seconds.
        follow: show each line of both outputs as a detail of the present work. Standard output is not returned.
        **options: of `subprocess.run`, such as `cwd`, `input`, `stdout` and `stderr`.

    Raises:
        EngineError: the program does not exist, or did not end in time.
    """
    logger.info("$ %s", shlex.join(command))
    with logged_output(follow=follow) as output:
        try:
            finished = subprocess.run(
                list(command),
                env={**(os.environ if env is None else env), PARENT: str(os.getpid())},
                timeout=timeout,
                text=True,
                check=False,
                start_new_session=_deferred.get(),
                **{"stdout": output.pipe if follow else subprocess.PIPE, "stderr": output.pipe, **options},
            )
        except FileNotFoundError as error:
            raise EngineError(
                f"the program {command[0]!r} is not installed", next_step=f"install {command[0]}"
            ) from error
        except subprocess.TimeoutExpired as error:
            output.failed = True
            raise EngineError(
                f"{command[0]!r} did not end within {timeout:.0f} s", next_step="see its output above"
            ) from error
        output.failed = finished.returncode != 0
    return finished


@dataclass(kw_only=True)
class Output:
    """The output of a program: the pipe that it writes to, its last lines, and whether it failed."""

    pipe: int
    lines: deque[str]
    failed: bool = False


@contextlib.contextmanager
def logged_output(*, follow: bool) -> Iterator[Output]:
    """Yield an output that is logged, line by line. If the program fails, print its last lines at the end."""
    reading, writing = os.pipe()
    output = Output(pipe=writing, lines=deque(maxlen=_KEPT_LINES))

    def log() -> None:
        with open(reading, encoding="utf-8", errors="replace") as stream:  # noqa: PTH123 - not a path
            for line in stream:
                text = redact(line.rstrip("\n"))
                if receive_record(text):
                    continue
                output.lines.append(text)
                logger.debug("%s", text)
                if follow:
                    detail(text)

    thread = threading.Thread(target=log, name="output of a program", daemon=True)
    thread.start()
    try:
        yield output
    finally:
        os.close(writing)
        thread.join(_LAST_LINES_SECONDS)
        if output.failed and not logger.isEnabledFor(logging.DEBUG):
            sys.stderr.write("".join(f"{line}\n" for line in list(output.lines)))
            sys.stderr.flush()


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM until the end of the block.

    Use it for short work that must not stop half-way. Programs that are started in the block get a new session, because
    a terminal interrupts all processes of its session.
    """
    received: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # signals interrupt only the main thread
        handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in _INTERRUPTS}
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
