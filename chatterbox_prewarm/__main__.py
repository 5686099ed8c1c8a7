"""`python -m chatterbox_prewarm`, and the command `chatterbox-prewarm`."""

from __future__ import annotations

import contextlib
import signal
import sys

_HELP = {"-h", "--help"}


def main() -> None:
    """Run the command line. A signal during its imports ends the process without a traceback."""
    if "serve" in sys.argv:
        # The same as the server does without requests. The first process of a container ignores SIGTERM until it has a
        # handler.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        worker = None
        if sys.argv[1:2] == ["serve"] and not _HELP & set(sys.argv):
            from chatterbox_prewarm.serve.workers.worker_process import start_process

            with contextlib.suppress(OSError):  # the server tries again, and reports the error
                worker = start_process()
        from chatterbox_prewarm.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run(worker)


if __name__ == "__main__":
    main()
