"""`run_warmup_benchmarks`: run the parts of a report, and continue after an interruption."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from chatterbox_prewarm.bench.executions import bake_if_missing, choose_state
from chatterbox_prewarm.bench.recorded_steps import RecordedSteps
from chatterbox_prewarm.bench.report.options import PARTS, ReportOptions
from chatterbox_prewarm.bench.report.parts import PART_FUNCTIONS
from chatterbox_prewarm.start.defaults import default_weights
from chatterbox_prewarm.system.atomic_files import remove
from chatterbox_prewarm.system.devices import check_device
from chatterbox_prewarm.system.paths import as_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)


def run_warmup_benchmarks(
    output: str | Path = "warmup-report",
    *,
    weights: str | Path | None = None,
    warm: str | Path | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = logger.info,
    **options: Any,
) -> dict[str, Any]:
    """Measure this project's claims, and record the results in `OUTPUT/results.json`.

    The file is complete and valid after every step. If the run was interrupted or a step failed, the same call measures
    the remaining steps.

    Example:
        >>> results = run_warmup_benchmarks("report", device="cuda")
        >>> page = generate_warmup_report(results, "report")

    Args:
        output: folder for the results.
        weights: the directory of a checkpoint; by default as `from_pretrained_with_warmup`.
        warm: a warm state that was baked for this machine; by default the one in an image. Elsewhere a state is baked
            in the folder.
        device: torch device.
        say: called with one line before each step.
        **options: other attributes of `ReportOptions`, such as `rounds` and `parts`.

    Returns:
        the content of the file: `plan`, `complete`, `failed` and `steps`.

    Raises:
        BadInputError: an option is invalid, the folder contains results of another measurement, or there is too little
            disk space or memory.
        PrewarmError: the state or the checkpoint cannot be read.
    """
    device, output = check_device(device), as_path(output, "the folder for the results")
    checkpoint = as_path(weights, "the checkpoint") if weights is not None else default_weights()
    report_options = ReportOptions(
        output=output,
        weights=checkpoint,
        warm=choose_state(warm, output),
        device=device,
        **options,
    )
    report_options.check()  # before a bake, which can take minutes
    if warm is None:
        bake_if_missing(report_options.warm, checkpoint, device, output, say=say)
    record = RecordedSteps(report_options.results, report_options.plan(), say)
    record.write(complete=False)  # it shows that the folder of the states is ours
    for part in report_options.parts:
        PART_FUNCTIONS[part](report_options, record)
    results = record.write(complete=set(report_options.parts) == set(PARTS))
    if not record.failed and report_options.states.exists():
        remove(report_options.states)
    return results
