"""Start a worker process. Its configuration is the first message that it receives.

So `serve` starts the first worker before it knows the configuration: two interpreters then start at the same time.
Importing this module is cheap.
"""

from __future__ import annotations

import socket
import subprocess
import sys

from chatterbox_prewarm.system.children import child_environment

#: A worker process and the front's end of the socket pair.
WorkerProcess = tuple["subprocess.Popen[bytes]", socket.socket]


def start_process() -> WorkerProcess:
    """Start a worker process, which imports its modules and waits for its configuration.

    Raises:
        OSError: the process could not be started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "chatterbox_prewarm.serve.workers", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=child_environment(),
            start_new_session=True,  # an interrupt from the terminal must reach only the front, which drains
        )
    return process, ours
