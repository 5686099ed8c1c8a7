"""Write the commit into wheels and sdists; everything else about the build is in `pyproject.toml`."""

import importlib.util
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("version", ROOT / "chatterbox_prewarm" / "version.py")
assert _spec is not None
assert _spec.loader is not None
version = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(version)


def _write_commit(package: Path) -> None:
    """Write the commit of this checkout. An sdist has the file already and is not a checkout, so it keeps its own."""
    if found := version.commit_of(ROOT):
        (package / version.COMMIT_FILE).write_text(f"{found}\n", encoding="ascii")


class BuildWithCommit(build_py):
    """Build the package with the file of the commit."""

    def run(self) -> None:
        """Build; see setuptools."""
        super().run()
        if not self.editable_mode:
            _write_commit(Path(self.build_lib) / "chatterbox_prewarm")


class SdistWithCommit(sdist):
    """Make an sdist with the file of the commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the files; see setuptools."""
        super().make_release_tree(base_dir, files)
        _write_commit(Path(base_dir) / "chatterbox_prewarm")


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SdistWithCommit})
