"""Child processes of this project: they take a JSON argument and print a JSON document."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.errors import ModelError, PrewarmError, as_prewarm_error, error_with_code
from chatterbox_prewarm.redaction import print_traceback
from chatterbox_prewarm.system.children import PARENT, die_with_parent
from chatterbox_prewarm.system.process import run as run_process
from chatterbox_prewarm.system.progress import send_records

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


#: Set by `--debug` for child processes.
DEBUG = "CHATTERBOX_PREWARM_DEBUG"


def run_module(
    module: str, arguments: Mapping[str, Any], *, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Run `python -m MODULE`, which calls `report`, in a fresh process.

    Args:
        module: full name of the module.
        arguments: the arguments of its function.
        env: the environment; by default the parent's.
        timeout: in seconds.

    Raises:
        PrewarmError: as `parse_report`.
        EngineError: the process did not end in time.
    """
    finished = run_process([sys.executable, "-m", module, json.dumps(arguments)], env=env, timeout=timeout)
    return parse_report(finished.stdout, finished.returncode)


def report(function: Callable[..., dict[str, Any]]) -> None:
    """Call `function` with the JSON object in `sys.argv[1]`, and print its result or the error that it raises."""
    die_with_parent()
    if PARENT in os.environ:
        send_records()
    with claim_stdout() as out:
        try:
            result = function(**json.loads(sys.argv[1]))
        except Exception as error:  # noqa: BLE001 - the parent reports every error
            if os.environ.get(DEBUG):
                print_traceback()
            json.dump(describe(as_prewarm_error(error)), out)
        else:
            json.dump(result, out)


def describe(error: PrewarmError) -> dict[str, Any]:
    """Return an error as the JSON object that the parent gets."""
    return {"error": error.message, "next_step": error.next_step, "exit_code": error.exit_code}


def rebuild(description: Mapping[str, Any]) -> PrewarmError:
    """Return the error that `describe` turned into a JSON object."""
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
    if status < 0:
        raise ModelError(
            f"the process was ended by signal {-status}",
            next_step="if it was out of memory, give the machine more; see its output above",
        )
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


def claim_stdout() -> Any:
    """Reserve standard output for the report. Packages that print write to standard error from now on."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet_packages()
    return out


def quiet_packages() -> None:
    """Silence deprecation warnings of the model's packages, because users of a container cannot act on them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
