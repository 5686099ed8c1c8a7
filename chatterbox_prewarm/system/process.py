"""Run external commands: log each one, and raise a clear error if it cannot be started."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.system.children import PARENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

#: Signals that interrupt a process, which then cleans up and ends.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
#: Whether interrupts are deferred at present.
_deferred: ContextVar[bool] = ContextVar("deferred", default=False)


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return its standard output as text. The caller checks `returncode`.

    Standard error is passed through by default, so that progress stays visible.

    Args:
        command: program and arguments.
        env: the environment; by default that of this process.
        timeout: in seconds.
        **options: of `subprocess.run`, such as `cwd`, `input`, `stdout` and `stderr`.

    Raises:
        EngineError: the program does not exist, or did not end in time.
    """
    logger.info("$ %s", shlex.join(command))
    try:
        return subprocess.run(
            list(command),
            env={**(os.environ if env is None else env), PARENT: str(os.getpid())},
            timeout=timeout,
            text=True,
            check=False,
            start_new_session=_deferred.get(),
            **{"stdout": subprocess.PIPE, **options},
        )
    except FileNotFoundError as error:
        raise EngineError(f"the program {command[0]!r} is not installed", next_step=f"install {command[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{command[0]!r} did not end within {timeout:.0f} s", next_step="see its output above"
        ) from error


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
