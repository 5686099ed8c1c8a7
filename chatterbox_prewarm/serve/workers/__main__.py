"""`python -m chatterbox_prewarm.serve.workers FD`: a worker process; see `worker_process`."""

from __future__ import annotations

from chatterbox_prewarm.system.children import die_with_parent


def main() -> None:
    """Run a worker."""
    die_with_parent()  # if the front is killed, the worker must not stay in memory
    from chatterbox_prewarm.serve.workers.worker import main as run
    from chatterbox_prewarm.start.ahead import torch_libraries

    torch_libraries()  # while this process waits for its configuration and verifies the warm state
    run()


if __name__ == "__main__":
    main()
