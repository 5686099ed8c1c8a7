"""The Dockerfile's variants for other builders."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.dockerfile import for_cdi, for_classic
from tests.conftest import ROOT, run_cli

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "Dockerfile").read_text()
STAGE = re.compile(r"^FROM \S+ AS (\S+)$", re.MULTILINE)


def test_with_cdi_the_step_that_bakes_has_the_gpus_and_nothing_else_changes() -> None:
    lines = for_cdi(TEXT).splitlines()
    assert lines[0] == "# syntax=docker/dockerfile:1-labs"
    changed = [(old, new) for old, new in zip(TEXT.splitlines(), lines[1:], strict=True) if old != new]
    ((old, new),) = changed
    assert new == old.replace("RUN ", "RUN --device=nvidia.com/gpu=all ")
    assert "/build/bake.py" in "".join(lines[lines.index(new) : lines.index(new) + 5])


def test_the_classic_builder_gets_no_mount_and_only_the_stages_that_the_target_stands_on() -> None:
    found = for_classic(TEXT, {"WEIGHTS": "synthetic"}, "runtime")
    assert "--mount" not in found
    assert STAGE.findall(found) == [
        "base",
        "installed",
        "packages",
        "deps",
        "weights-synthetic",
        "weights",
        "bake",
        "cold",
        "runtime",
    ]
    bake = found[found.index("AS bake") : found.index("AS cold")]
    copied = "COPY --from=weights /opt/chatterbox-prewarm/weights /opt/chatterbox-prewarm/weights\nRUN echo"
    assert copied in bake, "what was bound is copied before the step"
    assert STAGE.findall(for_classic(TEXT, {}, "runtime"))[4] == "weights-hub", "as the Dockerfile has it by default"
    assert STAGE.findall(for_classic(TEXT, {"DEPS": "other/image:1"}, "runtime")) == [
        *("deps", "weights-hub", "weights", "bake", "cold", "runtime"),
    ]
    assert STAGE.findall(for_classic(TEXT, {"WEIGHTS": "none"}, "cold")) == [
        *("base", "installed", "packages", "deps", "weights-none", "weights", "cold"),
    ]


def test_every_step_of_the_classic_variant_still_runs_something() -> None:
    for line in for_classic(TEXT, {}, "runtime").splitlines():
        assert not re.fullmatch(r"RUN\s*\\?", line)


def copied(stage: str) -> set[Path]:
    """The Python files of ours that a stage copies; whole folders are taken apart."""
    text = TEXT[TEXT.index(f" AS {stage}\n") :].replace("\\\n", " ")
    text = text[: text.find("\nFROM ")]
    named = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    paths = [ROOT / word for word in named if not word.startswith("--")]
    return {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}


def imports(tree: ast.AST) -> set[str]:
    """Modules of ours that a file imports when it runs, at its top or in a function; not for types alone."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        found |= imports(node)
    return {name for name in found if name.split(".")[0] == "chatterbox_prewarm"}


@pytest.mark.parametrize(
    ("stage", "unused"),
    [("weights-hub", {"chatterbox_prewarm.model.synthetic"}), ("weights-synthetic", set()), ("bake", set())],
)
def test_a_stage_that_copies_some_modules_copies_what_they_import(stage: str, unused: set[str]) -> None:
    files = copied(stage)
    assert len(files) > 5
    for file in files:
        for name in imports(ast.parse(file.read_text())) - unused:
            path = ROOT / name.replace(".", "/")
            needed = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            assert not needed.is_file() or needed in files, f"{file.name} imports {name}, which {stage} does not copy"


def test_a_stage_or_a_step_that_is_not_there_is_said() -> None:
    with pytest.raises(BadInputError, match="no stage 'nowhere'"):
        for_classic(TEXT, {}, "nowhere")
    with pytest.raises(BadInputError, match="no step that runs"):
        for_cdi("FROM scratch\n")


def test_the_command_prints_a_variant() -> None:
    printed = run_cli("dockerfile", "--for", "classic", "--checkout", ROOT, "--build-arg", "WEIGHTS=none")
    assert printed.stdout == for_classic(TEXT, {"WEIGHTS": "none"}, "runtime")
    assert run_cli("dockerfile", "--for", "cdi", "--checkout", ROOT).stdout == for_cdi(TEXT)
    assert run_cli("dockerfile", "--for", "cdi", "--checkout", "/nowhere").returncode == 16
