"""Processes that this project starts: they report whatever went wrong, and none outlives the one that started it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import PrewarmError
from chatterbox_prewarm.system.json_subprocess import DEBUG
from chatterbox_prewarm.system.process import PARENT
from tests.helpers.children import TIMEOUT, call, start

if TYPE_CHECKING:
    from pathlib import Path


def test_a_process_whose_parent_was_gone_before_it_looked_ends_itself() -> None:
    with start("fingerprint", {}, {PARENT: "4194305"}) as orphan:  # above the largest process number
        output, _ = orphan.communicate(timeout=TIMEOUT)
    assert orphan.returncode == -signal.SIGKILL
    assert output == ""


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_the_program_is_reported_as_one_with_a_traceback_on_request_alone(
    debug: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PrewarmError, match="a fault of this program: KeyError") as caught:
        call("probed", env={DEBUG: "1"} if debug else {}, warm=str(tmp_path), action="unheard of")
    assert caught.value.exit_code == 70
    assert ("Traceback" in capfd.readouterr().err) == debug
