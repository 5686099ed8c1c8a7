"""Commands, and what is not interrupted half way."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading

import pytest

from chatterbox_prewarm.system.process import run, undisturbed


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_what_is_not_to_be_disturbed(sent: signal.Signals) -> None:
    done: list[str] = []

    def end(*_: object) -> None:
        raise SystemExit(143)

    def work() -> None:
        with undisturbed():
            os.kill(os.getpid(), sent)
            with undisturbed():
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


def test_what_fails_undisturbed_fails_as_it_is() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="its own"), undisturbed():
        raise ValueError("its own")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_does_not_reach_what_is_started_undisturbed() -> None:
    command = [sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"]
    assert run(command).stdout == "False\n"
    with undisturbed():
        assert run(command).stdout == "True\n"


def test_another_thread_may_be_undisturbed_as_well() -> None:
    seen: list[str] = []

    def work() -> None:
        with undisturbed():
            seen.append("worked")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["worked"]


def test_what_a_command_prints_goes_to_files_as_it_is() -> None:
    program = "import sys; sys.stdout.buffer.write(b'\\xff\\r\\n'); sys.stderr.write('said')"
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as said:
        run([sys.executable, "-c", program], stdout=output, stderr=said)
        for stream in (output, said):
            stream.seek(0)
        assert (output.read(), said.read()) == (b"\xff\r\n", b"said")
