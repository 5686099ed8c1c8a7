"""Variants of the Dockerfile for other builders, and the packages that its stages copy."""

from __future__ import annotations

import re

import pytest

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.image.build_request import STAGE_ARGUMENTS
from chatterbox_prewarm.image.dockerfile import for_cdi, for_classic
from tests.conftest import ROOT, run_cli

TEXT = (ROOT / "Dockerfile").read_text()
STAGE = re.compile(r"^FROM \S+ AS (\S+)$", re.MULTILINE)


def test_the_variant_for_cdi_only_adds_the_gpus_to_the_bake_step() -> None:
    lines = for_cdi(TEXT).splitlines()
    assert lines[0] == "# syntax=docker/dockerfile:1-labs"
    changed = [(old, new) for old, new in zip(TEXT.splitlines(), lines[1:], strict=True) if old != new]
    ((old, new),) = changed
    assert new == old.replace("RUN ", "RUN --device=nvidia.com/gpu=all ")
    assert "/build/bake.py" in "".join(lines[lines.index(new) : lines.index(new) + 5])


def test_the_variant_for_the_classic_builder_has_no_mounts_and_only_the_stages_that_the_target_needs() -> None:
    variant = for_classic(TEXT, {"WEIGHTS": "synthetic"}, "runtime")
    assert "--mount" not in variant
    assert STAGE.findall(variant) == [
        "base",
        "uv",
        "packages-lean",
        "packages-full",
        "deps-lean",
        "deps-full",
        "weights-synthetic",
        "weights",
        "bake",
        "cold",
        "runtime",
    ]
    bake = variant[variant.index("AS bake") : variant.index("AS cold")]
    copy_before_run = "COPY --from=weights /opt/chatterbox-prewarm/weights /opt/chatterbox-prewarm/weights\nRUN echo"
    assert copy_before_run in bake, "a bound folder is copied before the step"
    assert STAGE.findall(for_classic(TEXT, {}, "runtime"))[6] == "weights-hub", "the default of the Dockerfile"
    assert STAGE.findall(for_classic(TEXT, {"DEPS": "other/image:1"}, "runtime")) == [
        *("deps-lean", "deps-full", "weights-hub", "weights", "bake", "cold", "runtime"),
    ]
    assert STAGE.findall(for_classic(TEXT, {"WEIGHTS": "none"}, "cold")) == [
        *("base", "uv", "packages-lean", "deps-lean", "weights-none", "weights", "cold"),
    ]


def test_the_arguments_that_select_stages_have_the_defaults_of_the_dockerfile() -> None:
    head = TEXT[: TEXT.index("\nFROM ")]
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", head, re.MULTILINE))
    selecting = set(re.findall(r"^FROM \S*\$\{(\w+)\}", TEXT, re.MULTILINE)) - {"BASE"}
    assert {name: defaults[name] for name in selecting} == STAGE_ARGUMENTS


def test_no_step_of_the_variant_for_the_classic_builder_is_empty() -> None:
    for line in for_classic(TEXT, {}, "runtime").splitlines():
        assert not re.fullmatch(r"RUN\s*\\?", line)


@pytest.mark.parametrize(
    ("stage", "unused"),
    [("weights-hub", {"model"}), ("weights-synthetic", set()), ("bake", set())],
)
def test_a_stage_copies_every_package_that_its_program_uses(stage: str, unused: set[str]) -> None:
    """`build/fetch.py` uses the package `model` only for synthetic weights."""
    text = TEXT[TEXT.index(f" AS {stage}\n") :]
    text = text[: text.index("\nFROM ")]
    packages = set(re.findall(r"^COPY chatterbox_prewarm/(\w+) /build/", text, re.MULTILINE))
    (line,) = re.findall(r"^COPY (chatterbox_prewarm/__init__\.py .*) /build/", text, re.MULTILINE)
    modules = set(re.findall(r"chatterbox_prewarm/(\w+)\.py", line)) - {"__init__"}  # it imports names on demand
    (program,) = re.findall(r"^COPY (build/\w+\.py) ", text, re.MULTILINE)
    files = [
        ROOT / program,
        *(ROOT / "chatterbox_prewarm" / f"{name}.py" for name in modules),
        *(file for name in packages for file in (ROOT / "chatterbox_prewarm" / name).rglob("*.py")),
    ]
    assert len(files) > 5
    for file in files:
        used = set(re.findall(r"\bchatterbox_prewarm\.(\w+)", file.read_text()))
        assert used <= packages | unused | modules, f"the stage {stage} lacks a package for {file}"


def test_a_missing_stage_or_step_is_reported() -> None:
    with pytest.raises(BadInputError, match="no stage 'nowhere'"):
        for_classic(TEXT, {}, "nowhere")
    with pytest.raises(BadInputError, match="no step that runs"):
        for_cdi("FROM scratch\n")


def test_the_command_prints_a_variant() -> None:
    printed = run_cli("dockerfile", "--for", "classic", "--checkout", ROOT, "--build-arg", "WEIGHTS=none")
    assert printed.stdout == for_classic(TEXT, {"WEIGHTS": "none"}, "runtime")
    assert run_cli("dockerfile", "--for", "cdi", "--checkout", ROOT).stdout == for_cdi(TEXT)
    assert run_cli("dockerfile", "--for", "cdi", "--checkout", "/nowhere").returncode == 16
