"""Errors of the system become messages that say what ran out and what to do."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError, ModelError, as_prewarm_error

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def huge_stacks() -> Iterator[None]:
    """Let each new thread need more memory than there are addresses."""
    before = threading.stack_size(1 << 47)
    yield
    threading.stack_size(before)


@pytest.mark.usefixtures("huge_stacks")
def test_a_thread_that_cannot_be_started_is_no_bug() -> None:
    with pytest.raises(RuntimeError) as caught:
        threading.Thread(target=print).start()
    error = as_prewarm_error(caught.value)
    assert isinstance(error, ModelError)
    assert "no further thread or process" in error.message
    assert "--threads" in error.next_step


def test_a_process_that_cannot_be_started_is_no_bug() -> None:
    refused = OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # what `fork` raises
    thrown = RuntimeError("Resource temporarily unavailable")  # what PyTorch makes of std::system_error
    for error in (as_prewarm_error(refused), as_prewarm_error(thrown)):
        assert isinstance(error, ModelError)
        assert "no further thread or process" in error.message


def test_a_missing_directory_for_temporary_files_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc", "/sys"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.mkdtemp()
    error = as_prewarm_error(caught.value)
    assert isinstance(error, BadInputError)
    assert "['/proc', '/sys']" in error.message
    assert "TMPDIR" in error.next_step


def test_too_many_open_files_name_the_limit() -> None:
    error = as_prewarm_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert "ulimit -n" in error.next_step
