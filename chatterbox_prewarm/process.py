"""Running a command to its end: logged, and with a clear error when it cannot be started."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
from typing import IO, TYPE_CHECKING

from chatterbox_prewarm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

#: Tells a process of this project who started it, so that it can see whether that one still lives.
PARENT = "CHATTERBOX_PREWARM_PARENT"


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float | None = None,
    with_stderr: bool = False,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed; the caller looks at `returncode`.

    Standard error is passed through, so that progress stays visible, or comes with what was printed (`with_stderr`).
    What is large or no text goes from and to files: `stdin`, `stdout`, `stderr`.

    Raises:
        EngineError: the program does not exist or ran past `timeout` seconds.
    """
    logger.info("$ %s", shlex.join(command))
    try:
        return subprocess.run(
            list(command),
            env={**(os.environ if env is None else env), PARENT: str(os.getpid())},
            cwd=cwd,
            timeout=timeout,
            stdin=stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.STDOUT if with_stderr else stderr,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise EngineError(f"the program {command[0]!r} is not installed", next_step=f"install {command[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{command[0]!r} did not end within {timeout:.0f} s", next_step="look at what it printed above"
        ) from error
