"""`python -m chatterbox_prewarm`, and the command `chatterbox-prewarm`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line. A signal during its imports ends the process without a traceback."""
    if "serve" in sys.argv:
        # The same as the server does without requests. The first process of a container ignores SIGTERM until it has a
        # handler.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        from chatterbox_prewarm.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
