"""The GPU for which tests compile without having it."""

from __future__ import annotations

from importlib.metadata import version

#: The newest GPU that a bake with the installed torch can compile for without having it.
NEWEST_TARGET = "NVIDIA H200" if version("torch").startswith("2.6.") else "NVIDIA B200"
