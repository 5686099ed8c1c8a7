"""What the worker processes of this project have in common: one JSON argument in, one JSON document out."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, PrewarmError, as_prewarm_error, error_with_code
from chatterbox_prewarm.system.process import PARENT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


_PR_SET_PDEATHSIG = 1
#: Set by `--debug`, for the processes that a command starts.
DEBUG = "CHATTERBOX_PREWARM_DEBUG"


def report(function: Callable[..., dict[str, Any]]) -> None:
    """Call `function` with the JSON object in `sys.argv[1]` and print what it returns, or the error it raises."""
    die_with_parent()
    with claim_stdout() as out:
        try:
            result = function(**json.loads(sys.argv[1]))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent is to say it
            if os.environ.get(DEBUG):
                traceback.print_exc()
            json.dump(describe(as_prewarm_error(error)), out)
        else:
            json.dump(result, out)


def describe(error: PrewarmError) -> dict[str, Any]:
    """An error as it travels to the parent."""
    return {"error": error.message, "next_step": error.next_step, "exit_code": error.exit_code}


def rebuild(description: Mapping[str, Any]) -> PrewarmError:
    """The error that `describe` described, of its kind."""
    return error_with_code(description["exit_code"], description["error"], description["next_step"])


def parse_report(output: str, status: int) -> dict[str, Any]:
    """Read the report of a finished child process and raise the error that it reported.

    Args:
        output: the child's standard output, one JSON document.
        status: its exit status.

    Raises:
        PrewarmError: the error that the child reported, of the same kind.
        ModelError: the child ended without a report.
    """
    if status != 0 or not output:
        raise ModelError(
            f"the process ended with status {status} before it could report", next_step="see its output above"
        )
    try:
        observed: dict[str, Any] = json.loads(output)
    except json.JSONDecodeError as error:
        raise ModelError(f"the process reported invalid JSON: {error}", next_step="see its output above") from error
    if "error" in observed:
        raise rebuild(observed)
    return observed


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone, however that ended."""
    end_with_parent(signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)  # it was gone before the kernel knew that we want to know


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the one that started it has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def claim_stdout() -> Any:
    """Take standard output for this program's own use: packages that print do so on standard error from here on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet_packages()
    return out


def quiet_packages() -> None:
    """Silence the model's packages about their own deprecations: nobody who runs a container can act on them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
