"""Progress on standard error: the steps of a command, with their times.

On a terminal, a line shows the present step, its present work, a bar if the share of the work that is done is known,
and the seconds. Elsewhere nothing is shown, unless --progress asks for it: then each step is a line with the seconds
since the command started, as logs need it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

import click

from chatterbox_prewarm.redaction import redact
from chatterbox_prewarm.system.progress import show_details

if TYPE_CHECKING:
    from tqdm import tqdm

Mode = Literal["live", "lines", "off"]

#: Seconds after which the line on a terminal is written again.
_REFRESH = 0.5
#: Columns for the seconds of a step and the space before them, for a bar, and at least for the text.
_TIME_COLUMNS, _BAR_COLUMNS, _TEXT_COLUMNS = 10, 20, 20


class Steps:
    """The steps of a command. Call it with the name of each step when it starts, and `close` it at the end."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._started = time.monotonic()
        self._step = ""
        self._bar: tqdm[None] | None = None
        self._ended = threading.Event()
        self._any = False

    def __call__(self, step: str) -> None:
        """Start a step; the step before it has ended."""
        step = redact(step)
        if self.mode == "lines":
            self._any = True
            self._print(step)
        elif self.mode == "live":
            self._end_line()
            self._start_line(step)

    def detail(self, text: str, passing: bool, share: float | None) -> None:
        """Show the present work of a step; see `system.progress.detail`."""
        if self.mode == "lines" and not passing:
            self._print(f"  {redact(text)}")
        elif self._bar is not None:
            self._describe(f"{self._step}: {redact(text)}", share)

    def close(self) -> None:
        """End the last step."""
        self._end_line()
        if self._any:
            self._any = False
            self._print("end")

    def _print(self, line: str) -> None:
        click.echo(f"[{time.monotonic() - self._started:7.1f} s] {line}", err=True)

    def _start_line(self, step: str) -> None:
        from tqdm import tqdm

        self._step = step
        columns = shutil.get_terminal_size().columns  # tqdm writes nothing to a terminal that says 0
        # TQDM_DISABLE, which is meant for the bars of packages, would switch the steps off: `disable` overrides it.
        shape: dict[str, Any] = {"total": 1.0, "ncols": columns, "position": 0, "disable": False}
        self._bar = tqdm(desc=step, file=sys.stderr, **shape)
        self._describe(step)
        self._ended = threading.Event()
        threading.Thread(target=self._tick, args=(self._bar, self._ended), daemon=True).start()

    def _describe(self, text: str, share: float | None = None) -> None:
        assert self._bar is not None
        columns, bar = shutil.get_terminal_size().columns - _TIME_COLUMNS, ""
        if share is not None and columns > _BAR_COLUMNS + _TEXT_COLUMNS:
            columns, bar = columns - _BAR_COLUMNS - 1, f"{{bar:{_BAR_COLUMNS}}} "
        columns = max(columns, _TEXT_COLUMNS)
        self._bar.bar_format, self._bar.n = f"{{desc}} {bar}{{elapsed}}", share or 0.0
        line = " ".join(text.split())
        self._bar.set_description_str(line if len(line) <= columns else f"{line[: columns - 1]}…")

    @staticmethod
    def _tick(bar: tqdm[None], ended: threading.Event) -> None:
        while not ended.wait(_REFRESH):
            bar.refresh()

    def _end_line(self) -> None:
        if self._bar is None:
            return
        self._ended.set()
        self._describe(self._step)  # without the last detail
        self._bar.close()
        self._bar = None


_steps = Steps("off")


def start(*, progress: bool | None, debug: bool) -> None:
    """Choose how the steps of this process are shown.

    Args:
        progress: True shows them everywhere, False nowhere, and None on a terminal.
        debug: the log is shown too, so nothing may be written over.
    """
    global _steps  # noqa: PLW0603 - one for each process, like its standard error
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if progress is False:
        _steps = Steps("off")
    elif terminal and not debug:
        _steps = Steps("live")
    else:
        _steps = Steps("lines" if progress or terminal else "off")
    show_details(_steps.detail)
    click.get_current_context().call_on_close(_steps.close)
    if progress is False:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the client of the hub shows other bars


def unattended() -> None:
    """Show the steps without a terminal too, unless --quiet. For a command whose steps are the log of a job."""
    if _steps.mode == "off" and click.get_current_context().find_root().params.get("progress") is None:
        _steps.mode = "lines"


def say(step: str) -> None:
    """Start a step of this command."""
    _steps(step)


def end() -> None:
    """End the last step, before a result is printed."""
    _steps.close()


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the log to standard error, above the line that shows the present step."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        with _line_hidden():
            super().emit(record)


def _line_hidden() -> contextlib.AbstractContextManager[object]:
    if _steps.mode != "live":
        return contextlib.nullcontext()
    from tqdm import tqdm

    hidden: contextlib.AbstractContextManager[object] = tqdm.external_write_mode(file=sys.stderr)
    return hidden
