"""Test that the steps of a command are shown on a terminal or on request, and that results can be JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from typing import TYPE_CHECKING

import click
import pytest

from chatterbox_prewarm.cli import cli
from chatterbox_prewarm.state.manifest_file import parse_manifest
from chatterbox_prewarm.system.fingerprint import upstream_installed
from tests.conftest import ROOT, run_cli
from tests.helpers.states import make_state
from tests.unit.commands.test_cli import all_commands

if TYPE_CHECKING:
    from pathlib import Path

#: A command with two steps. The second one logs a warning, and runs a child that prints, logs and says what it does and
#: how much of it is done.
_PROGRAM = """
import logging, sys, time
import click
from chatterbox_prewarm.cli import cli
from chatterbox_prewarm.commands.options import json_option, show
from chatterbox_prewarm.commands.progress import say
from chatterbox_prewarm.system.process import run

CHILD = '''
import logging, sys
from chatterbox_prewarm.system.progress import detail, send_records
send_records()
print("loaded a package", file=sys.stderr)
detail("the third of four", share=0.75)
logging.getLogger("child").warning("a warning of the child")
logging.getLogger("child").info("a remark of the child")
'''

@click.command()
@json_option
def work():
    say("the first step")
    say("the second step")
    logging.getLogger("parent").warning("a warning of the parent")
    run([sys.executable, "-c", CHILD])
    time.sleep(0.7)
    show("the result", {"result": 1})

cli.get_command = lambda context, name: work
from chatterbox_prewarm.cli import main
main()
"""


def _run(*arguments: str, terminal: bool = False) -> tuple[str, str]:
    """Run the program, and return its standard output and its standard error."""
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    # A start sets TQDM_DISABLE for the packages of the model, and some users do.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "TQDM_DISABLE": "1"}
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout, done.stderr
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while data := os.read(ours, 65536):
                written += data
        assert process.stdout is not None
        result = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0, written
    return result, written.decode()


def test_without_a_terminal_only_warnings_and_the_result_are_printed() -> None:
    out, err = _run("work")
    assert out == "the result\n"
    assert err == "WARNING: a warning of the parent\nWARNING: a warning of the child\n"


def test_a_terminal_shows_each_step_with_its_time_and_its_details() -> None:
    out, err = _run("work", terminal=True)
    assert out == "the result\n"
    lines = [line.rpartition("\r")[2] for line in err.replace("\r\n", "\n").split("\n")]
    assert [line for line in lines if line.startswith("the first step 00:")], err
    assert "the second step: the third of four ███████████████      00:" in err
    assert lines[-2].startswith("the second step 00:")
    assert "loaded a package" not in err
    assert "WARNING: a warning of the parent" in lines


def test_progress_without_a_terminal_is_a_line_for_each_step() -> None:
    _, err = _run("--progress", "work")
    steps = [line.partition("s] ")[2] for line in err.splitlines() if line.startswith("[")]
    assert steps == ["the first step", "the second step", "  the third of four", "end"]


def test_quiet_shows_no_step_on_a_terminal() -> None:
    _, err = _run("--quiet", "work", terminal=True)
    assert "step" not in err
    assert "a warning of the child" in err


def test_debug_shows_the_log_of_this_process_and_what_the_packages_of_a_child_print() -> None:
    _, err = _run("--debug", "work")
    assert "DEBUG: loaded a package" in err
    assert "INFO: $ " in err


def test_the_result_can_be_json() -> None:
    out, err = _run("work", "--json")
    assert json.loads(out) == {"result": 1}
    assert "result" not in err


def test_a_command_that_prints_a_result_can_print_it_as_json() -> None:
    """Commands without --json print a document, write a file, or run until they are stopped."""
    commands = {name: command for name, command in all_commands(cli).items() if not isinstance(command, click.Group)}
    without = {name for name, command in commands.items() if not any("--json" in each.opts for each in command.params)}
    assert without == {
        *("dockerfile", "facts", "sbom", "serve"),
        *(name for name in commands if name.startswith(("bench ", "k8s "))),
    }


@pytest.mark.skipif(not upstream_installed(), reason="a family that only upstream's code uses does not fit without it")
def test_the_results_of_pack_and_verify_are_documents(tmp_path: Path) -> None:
    make_state(tmp_path / "warm", {"numba": {"index.nbi": b"index"}})
    packed = run_cli("pack", "--warm", tmp_path / "warm", "--output", tmp_path / "layer.tar.gz", "--json")
    assert packed.returncode == 0, packed.stderr
    document = json.loads(packed.stdout)
    assert document["bytes"] == (tmp_path / "layer.tar.gz").stat().st_size
    assert set(document) == {"output", "bytes", "digest", "diff_id"}
    verified = run_cli("verify", "--warm", tmp_path / "warm", "--weights", tmp_path, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["lines"][0] == "numba: 1 file(s) intact, fits this machine"
    inspected = run_cli("inspect", "--warm", tmp_path / "warm", "--json")
    assert parse_manifest(inspected.stdout.encode(), source="inspect").families[0].name == "numba"


@pytest.mark.parametrize("record", ["\x1e{", '\x1e{"level": "high"}', "\x1e[1]"])
def test_a_damaged_record_is_a_line_of_the_log(record: str, caplog: pytest.LogCaptureFixture) -> None:
    from chatterbox_prewarm.system.process import run

    with caplog.at_level(logging.DEBUG):
        run([sys.executable, "-c", f"import sys; sys.stderr.write({record!r})"])
    assert record in caplog.messages
