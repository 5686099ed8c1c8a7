"""Test that commands run to their end, and that interrupts can be deferred."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading

import pytest

from chatterbox_prewarm.errors import EngineError
from chatterbox_prewarm.system.process import deferred_interrupts, run


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
