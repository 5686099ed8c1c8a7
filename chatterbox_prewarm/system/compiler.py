"""The programs and files that compiling the regions of the model needs."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def missing_packages() -> list[str]:
    """Return the Debian packages that this machine lacks to compile the regions of the model.

    torch's Inductor runs the compiler `$CXX`, by default g++, and its C++ wrappers include `Python.h`.
    """
    missing = []
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        missing.append("g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("python3-dev")
    return missing
