"""Starting workers: a process for each, and a socket pair by which the front speaks with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from chatterbox_prewarm.system.process import PARENT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatterbox_prewarm.serve.workers.worker import WorkerConfig

    Spawned = tuple[subprocess.Popen[bytes], socket.socket]


def spawn(config: WorkerConfig) -> Spawned:
    """Start a worker process; returns it and our end of the socket pair."""
    ours, theirs = socket.socketpair()
    with theirs:
        config = replace(config, fd=theirs.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_prewarm.serve.workers.worker", config.to_argument()],
            pass_fds=[theirs.fileno()],
            env={**os.environ, PARENT: str(os.getpid())},
            start_new_session=True,  # an interrupt from the terminal is for the front, which drains
        )
    return process, ours


def spawn_all(configs: Sequence[WorkerConfig]) -> list[tuple[WorkerConfig, Spawned]]:
    """Start a worker for each configuration, side by side.

    Raises:
        OSError: one could not be started; the others were ended.
    """
    started: list[tuple[WorkerConfig, Spawned]] = []
    try:
        for config in configs:
            started.append((config, spawn(config)))  # noqa: PERF401 - what was started is needed when one fails
    except OSError:
        for _, (process, _) in started:
            process.terminate()
        raise
    return started
