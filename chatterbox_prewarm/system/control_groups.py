"""The control groups of this process, whose limits are those of its container. A container sees all of its node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")


def control_groups(controller: str, mount: Path = MOUNT, groups: Path = GROUPS) -> Iterator[Path]:
    """Yield the folder of each control group of this process and of the groups above it.

    Args:
        controller: such as "cpu"; version 1 has a tree of groups for each controller.
        mount: where the control groups are mounted, version 1 or 2.
        groups: the list of the control groups of this process.
    """
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controllers  # version 2 has one tree without a name
        # A container may see the path of its group on the node, which is not mounted here. The top is its group then.
        for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if not folder.is_relative_to(top):
                break
            yield folder
