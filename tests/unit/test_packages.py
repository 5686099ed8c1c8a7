"""Test the wheel and the sdist: their contents, and that the program runs from an unpacked wheel."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import ROOT
from tests.helpers.packages import Environment, build_package, checkout_files, copy_checkout, git


def _interpreters() -> list[str]:
    """Return the interpreters that this package supports, one of each version: those of pyenv, and the running one."""
    found = {sys.version_info[:2]: sys.executable}
    for program in (Path.home() / ".pyenv" / "versions").glob("3.*/bin/python"):
        major, minor = map(int, program.parent.parent.name.split(".")[:2])
        if (3, 10) <= (major, minor) <= (3, 13):
            found.setdefault((major, minor), str(program))
    return [found[version] for version in sorted(found)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("packages") / "checkout")


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build_package("wheel", checkout, checkout.parent / "wheel")


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    return build_package("sdist", checkout, checkout.parent / "sdist")


def test_the_wheel_has_all_files_of_the_package_and_nothing_else(wheel: Path) -> None:
    expected = {name for name in checkout_files() if name.startswith("chatterbox_prewarm/")}
    assert {PurePosixPath(name).suffix for name in expected} > {".py", ".html", ".js", ".cpp", ".json", ".typed"}
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
        licences = {name.rpartition("/")[2] for name in opened.namelist() if "/licenses/" in name}
    assert names == expected | {"chatterbox_prewarm/commit.txt"}
    assert licences == {"LICENSE", "NOTICE.md"}


def test_the_wheel_states_its_version_extras_and_program(wheel: Path) -> None:
    from chatterbox_prewarm.version import __version__

    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (name for name in opened.namelist() if name.endswith("/METADATA"))
        stated = email.message_from_bytes(opened.read(metadata))
        programs = opened.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert (stated["Name"], stated["Version"]) == ("chatterbox-prewarm", __version__)
    assert {"lean", "multilingual", "model", "trust", "report"} <= set(stated.get_all("Provides-Extra") or [])
    assert "chatterbox-prewarm = chatterbox_prewarm.__main__:main" in programs


def test_the_program_runs_from_an_unpacked_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path)
    for arguments, expected in (
        (["--version"], f"(commit {git(checkout, 'rev-parse', 'HEAD')})"),
        (["bake", "--help"], "--profile"),
        (["k8s", "render", "--help"], "--image"),
    ):
        command = [sys.executable, "-m", "chatterbox_prewarm", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert expected in ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", _interpreters())
def test_the_wheel_installs_and_runs_on_every_python_of_this_machine(
    interpreter: str, wheel: Path, tmp_path: Path
) -> None:
    """Without extras and without the locks, in an environment of its own."""
    Environment(interpreter, tmp_path / "new").install(str(wheel))
    program = tmp_path / "new" / "bin" / "chatterbox-prewarm"
    for arguments, code, expected in (
        (["--version"], 0, "(commit "),
        (["bake", "--help"], 0, "--profile"),
        (["k8s", "render", "--help"], 0, "--image"),
        (["inspect", "--warm", "missing"], 12, "next: "),
    ):
        ran = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert ran.returncode == code, ran.stderr
        assert expected in ran.stdout + ran.stderr
    # Also the modules that need an extra must at least be valid on this version.
    (package,) = (tmp_path / "new" / "lib").glob("python3*/site-packages/chatterbox_prewarm")
    compiled = subprocess.run(
        [tmp_path / "new" / "bin" / "python", "-m", "compileall", "-q", "-f", package], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stdout


def test_the_sdist_builds_the_same_wheel_and_keeps_its_commit_in_another_repository(
    sdist: Path, wheel: Path, checkout: Path, tmp_path: Path
) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").touch()
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "another repository")
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
        opened.extractall(tmp_path, filter="data")
    assert {"LICENSE", "NOTICE.md", "CHANGELOG.md", "README.md", "pyproject.toml", "setup.py"} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "docs", ".ci"))}
    (source,) = (path for path in tmp_path.iterdir() if path.name.startswith("chatterbox_prewarm-"))
    again = build_package("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(wheel) as other:
        assert one.read("chatterbox_prewarm/commit.txt").decode().strip() == git(checkout, "rev-parse", "HEAD")
        content = {name: one.read(name) for name in one.namelist() if not name.endswith("/RECORD")}
        assert content == {name: other.read(name) for name in other.namelist() if not name.endswith("/RECORD")}


def test_the_licences_of_others_are_in_the_image() -> None:
    from importlib import metadata

    text = (ROOT / "Dockerfile").read_text()
    assert "COPY LICENSE NOTICE.md /usr/share/doc/chatterbox-prewarm/" in text
    notice = (ROOT / "NOTICE.md").read_text()
    (licence,) = (path for path in metadata.files("chatterbox-tts") or [] if path.name == "LICENSE")
    words = " ".join(licence.read_text().split())
    assert words in " ".join(notice.replace(">", " ").split()), "the text of upstream's licence, word by word"
