"""Test that child processes report their result or their error, and that they end with their parent."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm import errors
from chatterbox_prewarm.system.children import PARENT
from chatterbox_prewarm.system.json_subprocess import DEBUG, parse_report
from tests.helpers.children import TIMEOUT, call, start

if TYPE_CHECKING:
    from pathlib import Path


def test_a_process_whose_parent_ended_before_it_started_kills_itself() -> None:
    with start("fingerprint", {}, {PARENT: "4194305"}) as orphan:  # larger than any process id
        output, _ = orphan.communicate(timeout=TIMEOUT)
    assert orphan.returncode == -signal.SIGKILL
    assert output == ""


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_reported_with_exit_code_70_and_a_traceback_only_in_debug_mode(
    debug: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(errors.PrewarmError, match="a bug of this program: KeyError") as caught:
        call("probed", env={DEBUG: "1"} if debug else {}, warm=str(tmp_path), action="unknown")
    assert caught.value.exit_code == 70
    assert ("Traceback" in capfd.readouterr().err) == debug


def test_a_report_is_returned_unchanged() -> None:
    report = {"audio": {"samples": 960}, "network": [], "text": "Grüße"}
    assert parse_report(json.dumps(report), 0) == report


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (10, errors.WeightsError),
        (11, errors.FingerprintMismatchError),
        (12, errors.IntegrityError),
        (13, errors.NotWarmError),
        (14, errors.EngineError),
        (15, errors.ModelError),
        (16, errors.BadInputError),
        (70, errors.PrewarmError),
        (99, errors.PrewarmError),
    ],
)
def test_a_reported_error_is_raised_with_its_class(code: int, kind: type[errors.PrewarmError]) -> None:
    report = json.dumps({"error": "it failed", "next_step": "fix it", "exit_code": code})
    with pytest.raises(kind) as caught:
        parse_report(report, 0)
    assert type(caught.value) is kind
    assert caught.value.message == "it failed"
    assert caught.value.next_step == "fix it"


@pytest.mark.parametrize(
    ("output", "status", "message"),
    [
        ("", 0, "ended with status 0 "),
        ("", 1, "ended with status 1 "),
        ("{}", 1, "ended with status 1 "),
        ('{"half":', -9, "ended by signal 9"),
    ],
)
def test_a_process_without_a_report_is_a_model_error(output: str, status: int, message: str) -> None:
    with pytest.raises(errors.ModelError, match=message):
        parse_report(output, status)


def test_an_invalid_report_is_a_model_error() -> None:
    with pytest.raises(errors.ModelError, match="invalid JSON"):
        parse_report('{"half":', 0)
