"""Test the configuration file: its place, the precedence of its values, and the messages about its errors."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click
import pytest

from chatterbox_prewarm.cli import cli
from chatterbox_prewarm.commands.config_file import NAME, ConfigFile, read_config_file
from chatterbox_prewarm.errors import BadInputError
from tests.conftest import ROOT, run_cli
from tests.helpers.states import make_state
from tests.unit.commands.test_cli import all_commands

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with two states, `one` and `two`."""
    for name in ("one", "two"):
        make_state(tmp_path / name, {"numba": {"index.nbi": name.encode()}})
    return tmp_path


def _run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_cli(*arguments, cwd=folder, env={**ENVIRONMENT, **environment})


def _digest(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["set_digest"])


def test_an_option_precedes_the_environment_which_precedes_the_file_which_precedes_the_default(folder: Path) -> None:
    assert _run(folder, "inspect", "--json").returncode != 0, "the default is not a state of this test"
    (folder / NAME).write_text('[inspect]\nwarm = "one"\njson = true\n')
    one = _digest(_run(folder, "inspect"))
    two = _digest(_run(folder, "inspect", CHATTERBOX_PREWARM_WARM="two"))
    assert one != two
    assert _digest(_run(folder, "inspect", "--warm", "one", CHATTERBOX_PREWARM_WARM="two")) == one


def test_the_table_of_a_pyproject_is_used_unless_there_is_a_file_of_its_own(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[tool.chatterbox-prewarm.inspect]\nwarm = "one"\njson = true\n')
    one = _digest(_run(folder, "inspect"))
    (folder / NAME).write_text('[inspect]\nwarm = "two"\njson = true\n')
    assert _digest(_run(folder, "inspect")) != one


def test_a_pyproject_without_the_table_is_no_configuration(tmp_path: Path) -> None:
    assert read_config_file(tmp_path) is None
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert read_config_file(tmp_path) is None


def test_a_required_option_and_an_option_of_the_program_can_be_set(folder: Path) -> None:
    (folder / NAME).write_text('progress = true\n[pack]\nwarm = "one"\noutput = "layer.tar.gz"\n')
    packed = _run(folder, "pack")
    assert packed.returncode == 0, packed.stderr
    assert (folder / "layer.tar.gz").is_file()
    assert "packing one" in packed.stderr
    assert _run(folder, "--quiet", "pack").stderr == ""


@pytest.mark.parametrize(
    ("content", "command", "message"),
    [
        ("[serve]\nprot = 1\n", ["serve"], "chatterbox-prewarm.toml: unknown key serve.prot"),
        ('[serve]\nport = "80"\n', ["serve"], "chatterbox-prewarm.toml: serve.port must be a whole number"),
        ("[serve]\nport = true\n", ["serve"], "serve.port must be a whole number"),
        ("[serve]\nport = 0\n", ["serve"], "serve.port cannot be used: 0 is not in the range"),
        ("[serve]\nqueue-seconds = 'long'\n", ["serve"], "serve.queue-seconds must be a number"),
        ("[serve]\nlog-text = 1\n", ["serve"], "serve.log-text must be true or false"),
        ("[serve]\nvoice = 'a=b'\n", ["serve"], "serve.voice must be a list of texts"),
        ("[serve]\nvoice = [1]\n", ["serve"], "serve.voice must be a list of texts"),
        ("[inspect]\ndiff = ['a']\n", ["inspect"], "inspect.diff must be a list of 2 texts"),
        ("[bake]\nprofile = 'fast'\n", ["bake"], "bake.profile cannot be used: 'fast' is not one of"),
        ("[bake]\ntargets = ['sm_90']\n", ["bake"], "unknown key bake.targets"),
        ("bake = 1\n", ["inspect"], "bake must be a table with options of the command bake"),
        ("[weights.fletch]\n", ["weights", "verify", "x"], "unknown key weights.fletch"),
        ("[weights]\nfetch = 1\n", ["weights", "verify", "x"], "weights.fetch must be a table"),
        ("[brake]\n", ["inspect"], "unknown key brake"),
        ("quiet = 'no'\n", ["inspect"], "unknown key quiet"),
        ("progress = 'no'\n", ["inspect"], "progress must be true or false"),
        ("[[bake]]\ngpus = []\n", ["inspect"], "has the table 'bake' of a list of bakes"),
        ("[image]\nbase = 'a'\n", ["inspect"], "has the table 'image' of a list of bakes"),
        ("[bake\n", ["inspect"], "chatterbox-prewarm.toml is not TOML"),
    ],
)
def test_an_error_in_the_file_names_the_file_and_the_key(
    tmp_path: Path, content: str, command: list[str], message: str
) -> None:
    (tmp_path / NAME).write_text(content)
    refused = _run(tmp_path, *command)
    assert refused.returncode == 16, refused.stderr
    assert message in refused.stderr
    assert "next: " in refused.stderr


def test_an_error_in_a_pyproject_names_its_table(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.chatterbox-prewarm.pack]\nouput = 'x'\n")
    refused = _run(tmp_path, "pack")
    assert refused.returncode == 16
    assert "pyproject.toml [tool.chatterbox-prewarm]: unknown key pack.ouput" in refused.stderr
    assert "next: use one of: output" in refused.stderr


@pytest.mark.parametrize("content", [b"tool = ", b"tool = 1", b"\xff"])
def test_a_pyproject_of_another_project_that_cannot_be_read_is_left_out(content: bytes, folder: Path) -> None:
    (folder / "pyproject.toml").write_bytes(content)
    shown = _run(folder, "inspect", "--warm", "one", "--json")
    _digest(shown)
    assert "WARNING: pyproject.toml" in shown.stderr
    assert "continuing without this file" in shown.stderr
    (folder / NAME).write_bytes(content)
    assert _run(folder, "inspect", "--warm", "one").returncode == 16


def test_every_option_of_every_command_can_be_set() -> None:
    """The value of each option is checked with the option's own type."""
    samples: dict[str, object] = {
        "integer": 3,
        "integer range": 10,
        "float range": 5.5,
        "device": "cuda:1",
        "devices": "cuda:0,cuda:1",
        "digest": f"sha256:{'0' * 64}",
        "commit": "0" * 40,
        "host": "tts.example",
        "systems": "torch,warm",
        "origin": "https://chat.example",
        "model": "turbo",
        "language": "fr",
    }
    count = 0
    for command in all_commands(cli).values():
        if isinstance(command, click.Group):
            continue
        tables: dict[str, object] = {}
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            value = samples.get(option.type.name, "text")
            if option.is_flag:
                value = True
            elif isinstance(option.type, click.Choice):
                value = option.type.choices[0]
            if option.multiple or option.nargs > 1:
                value = [value] * max(option.nargs, 1)
            tables[max(option.opts, key=len).removeprefix("--")] = value
        found = ConfigFile(source="a file", tables={}).defaults(command, click.Context(command), tables)
        assert len(found) == len(tables)
        count += len(found)
    assert count > 100


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(BadInputError, match="reading the configuration file"):
        read_config_file(tmp_path)


def test_debug_in_the_file_adds_a_traceback_to_an_error(tmp_path: Path) -> None:
    arguments = ("inspect", "--warm", "missing")
    assert "Traceback" not in _run(tmp_path, *arguments).stderr
    (tmp_path / NAME).write_text("debug = true\n")
    assert "Traceback" in _run(tmp_path, *arguments).stderr
