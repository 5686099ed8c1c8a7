"""Test that commands run to their end, and that interrupts can be deferred."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.system.process import deferred_interrupts, run
from chatterbox_prewarm.system.progress import show_details


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_the_outermost_block(sent: signal.Signals) -> None:
    done: list[str] = []

    def end(*_: object) -> None:
        raise SystemExit(143)

    def work() -> None:
        with deferred_interrupts():
            os.kill(os.getpid(), sent)
            with deferred_interrupts():
                os.kill(os.getpid(), sent)
                done.append("inner")
            done.append("outer")

    before = signal.signal(sent, end)
    try:
        with pytest.raises(SystemExit):
            work()
        assert done == ["inner", "outer"]
        assert signal.getsignal(sent) is end
    finally:
        signal.signal(sent, before)


def test_an_error_in_the_block_is_passed_on() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="an error"), deferred_interrupts():
        raise ValueError("an error")
    assert signal.getsignal(signal.SIGINT) is before


def test_commands_started_in_the_block_have_their_own_session() -> None:
    command = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"]
    assert run(command).stdout == "False\n"
    with deferred_interrupts():
        assert run(command).stdout == "True\n"


def test_interrupts_can_be_deferred_in_another_thread() -> None:
    results: list[str] = []

    def work() -> None:
        with deferred_interrupts():
            results.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == ["worked"]


def test_output_is_written_to_files_without_changes() -> None:
    program = "import sys; sys.stdout.buffer.write(b'\\xff\\r\\n'); sys.stderr.write('text')"
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        run([sys.executable, "-c", program], stdout=output, stderr=errors)
        for stream in (output, errors):
            stream.seek(0)
        assert (output.read(), errors.read()) == (b"\xff\r\n", b"text")


def test_a_missing_program_and_a_timeout_are_errors_that_name_the_program() -> None:
    with pytest.raises(EngineError, match="the program 'no-such-program' is not installed") as caught:
        run(["no-such-program"])
    assert caught.value.exit_code == 14
    with pytest.raises(EngineError, match="'sleep' did not end within 0 s"):
        run(["sleep", "60"], timeout=0.1)


def _failing(code: int) -> list[str]:
    program = (
        f"import sys; sys.stderr.write('first\\nAuthorization: Bearer abcdefghijklmnop12345\\n'); sys.exit({code})"
    )
    return [sys.executable, "-c", program]


def test_the_standard_error_of_a_program_is_printed_only_if_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(_failing(0)).returncode == 0
    assert capfd.readouterr().err == ""
    assert run(_failing(3)).returncode == 3
    assert capfd.readouterr().err == "first\nAuthorization: ***\n"


def test_the_standard_error_of_a_program_that_does_not_end_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys, time; print('working', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(EngineError, match="did not end within 3 s"):
        run([sys.executable, "-c", program], timeout=3)
    assert capfd.readouterr().err == "working\n"


def test_a_process_that_a_program_leaves_behind_delays_nothing_for_long() -> None:
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])"
    started = time.monotonic()
    assert run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0
    assert time.monotonic() - started < 15


def test_both_outputs_of_a_followed_program_are_details() -> None:
    details: list[str] = []
    show_details(lambda text, *_: details.append(text))
    try:
        run(["sh", "-c", "echo out; echo err >&2"], follow=True)
    finally:
        show_details(None)
    assert details == ["out", "err"]
