"""Test the example workflows for GitHub Actions and GitLab CI: their schemas, their shell, and their commands.

A job of them needs an engine with a GPU or a cluster. So the commands that need neither run here one by one, against a
registry on the loopback interface.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest
import yaml

from chatterbox_prewarm.cli import cli
from chatterbox_prewarm.state.state import State
from tests.conftest import ROOT, run_cli
from tests.helpers.command_line import parse
from tests.helpers.images import make_base
from tests.helpers.keys import make_keys
from tests.helpers.registry_server import serve
from tests.helpers.states import make_state, record_weights, rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES = ROOT / "docs" / "examples"
WORKFLOWS = ("github-actions.yml", "gitlab-ci.yml")
SCHEMAS = {
    "github-actions.yml": ["vendor.github-workflows"],
    "gitlab-ci.yml": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
}
PROGRAM = "chatterbox-prewarm"
#: The commands that run here, without an engine, a GPU or a cluster, and the programs that prepare them.
RUNNABLE = {"sign", "attest", "verify", "sbom", "k8s"}
HELPERS = {"umask", "printf", "openssl"}
LABELS = {"io.chatterbox-prewarm.torch": "torch-2.6", "io.chatterbox-prewarm.variant": "english"}
FAMILIES = {
    "bytecode": {"modules.pack": b"code"},
    "numba": {"librosa/filters.nbi": b"index"},
    "signal": {"constants.safetensors": b"tensors"},
    "conditionals": {"default.safetensors": b"voice"},
}


def _scripts(workflow: str) -> Iterator[str]:
    """Yield the shell script of each step of GitHub, and of each job of GitLab."""
    raw = yaml.safe_load((EXAMPLES / workflow).read_text())
    for job in raw["jobs"].values() if workflow.startswith("github") else raw.values():
        yield from (step["run"] for step in job.get("steps", []) if "run" in step)
        if lines := [*job.get("before_script", []), *job.get("script", [])]:
            yield "\n".join(lines)


def _lines(workflow: str) -> list[str]:
    """Return the lines of all scripts, with continued lines joined."""
    return [line for script in _scripts(workflow) for line in script.replace("\\\n", " ").splitlines() if line.strip()]


def _commands(workflow: str) -> list[list[str]]:
    """Return the arguments of each command of this program. Variables stay as they are."""
    return [shlex.split(line)[1:] for line in _lines(workflow) if line.startswith(f"{PROGRAM} ")]


def _parse(arguments: list[str]) -> list[str]:
    """Parse a command line as the program does, without running it, and return the names of its commands."""
    return parse(cli, PROGRAM, arguments).command_path.split()[1:]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_command_of_a_workflow_has_valid_options(workflow: str) -> None:
    names = [" ".join(_parse(arguments)) for arguments in _commands(workflow)]
    assert names == ["doctor", "build", "sign", "build", "attest", "verify", "sbom", "k8s render-bake"]


def test_an_unknown_option_or_a_missing_value_is_found() -> None:
    for arguments in (["build", "--tag", "a", "--gpu"], ["attest", "--image", "a"], ["k8s", "render-bakes"]):
        with pytest.raises(click.UsageError):
            _parse(arguments)


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_every_script_of_a_workflow_is_valid_shell(workflow: str) -> None:
    scripts = list(_scripts(workflow))
    assert scripts
    for script in scripts:
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.programs
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_has_the_schema_of_its_service(workflow: str) -> None:
    program = shutil.which("check-jsonschema")
    if program is None:
        pytest.skip("this machine has no check-jsonschema")
    command = [program, "--builtin-schema", *SCHEMAS[workflow], str(EXAMPLES / workflow)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture
def job(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Make what the steps before have made: a pushed image, a state, evidence. Yield the environment of a job."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "out").mkdir()
    make_state(work / "out" / "warm", FAMILIES)
    rewrite(work / "out" / "warm", lambda raw: raw["fingerprint"].update(torch="2.6.0", arch=platform.machine()))
    shutil.copytree(work / "out" / "warm", work / "image" / "opt" / PROGRAM / "warm")
    record_weights(work / "image" / "opt" / PROGRAM / "weights")
    (work / "image" / "opt" / "venv" / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
    state = State.read(work / "out" / "warm")
    checks = [{"name": "no other miss", "passed": True, "seen": "none"}]
    evidence = {"passed": True, "set_digest": state.manifest.set_digest, "checks": checks, "observed": {}}
    (work / "evidence.json").write_text(json.dumps(evidence))
    (work / "prewarm.toml").write_text(
        '[image]\nbase = "registry.example.com/speech:cold"\ntarget = "registry.example.com/speech:1"\n'
        '[[bake]]\ngpus = ["NVIDIA L4"]\n'
    )
    program = tmp_path / "bin" / PROGRAM
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom chatterbox_prewarm.__main__ import main\nmain()\n")
    program.chmod(0o755)
    from chatterbox_prewarm.image.oci_layout import Layout

    layout = Layout(tmp_path / "layout")
    make_base(layout, "base", Labels=LABELS)
    with serve(tmp_path / "registry") as registry:
        image = f"{registry.address}/speech:warm"
        base = f"oci:{layout.path}:base"
        pushed = run_cli("append", "--base", base, "--to", image, "--warm", work / "out" / "warm", "--json")
        assert pushed.returncode == 0, pushed.stderr
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith("CHATTERBOX_")},
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "IMAGE": image,
            "PINNED": f"{registry.address}/speech@{json.loads(pushed.stdout)['digest']}",
            "TOOLS": "registry.example.com/speech:tools",
            "RUNNER_TEMP": str(work),
            "KUBECONFIG_CONTENT": "apiVersion: v1",
        }


@pytest.mark.programs
@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_commands_that_need_no_engine_run_in_their_order(
    workflow: str, job: dict[str, str], tmp_path: Path
) -> None:
    private, _ = make_keys(tmp_path)
    # A secret of GitHub is a text, and a variable of the type File is a path.
    key = private.read_text() if workflow.startswith("github") else str(private)
    ran = []
    for line in _lines(workflow):
        words = shlex.split(line)
        names = _parse(words[1:]) if words[0] == PROGRAM else words[:1]
        if names[0] not in RUNNABLE | HELPERS:
            continue
        done = subprocess.run(
            ["bash", "-euc", line],
            capture_output=True,
            text=True,
            cwd=job["RUNNER_TEMP"],
            env={**job, "SIGNING_KEY": key},
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        ran += names[:1]
        if names[0] == "verify":
            assert "signed, 1 tests passed" in done.stdout
    assert [name for name in ran if name in RUNNABLE] == ["sign", "attest", "verify", "sbom", "k8s"]
    work = tmp_path / "work"
    assert (work / "out" / "warm.sig").is_file()
    assert json.loads((work / "sbom.json").read_text())["bomFormat"] == "CycloneDX"
    jobs = [each for each in yaml.safe_load_all((work / "bake.yaml").read_text()) if each["kind"] == "Job"]
    assert [each["metadata"]["labels"]["app.kubernetes.io/component"] for each in jobs] == ["bake"]
