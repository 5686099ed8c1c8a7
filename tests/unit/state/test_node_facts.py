"""A node's facts: written without anything heavy, read with care."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click.testing
import pytest

from chatterbox_prewarm.commands.nodes import facts
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.node_facts import host_facts, read_host_facts, to_json
from chatterbox_prewarm.system.fingerprint import MACHINE, read_fingerprint
from tests.helpers.children import call

if TYPE_CHECKING:
    from pathlib import Path


def test_the_facts_are_the_machines_own_and_need_nothing_heavy() -> None:
    seen = call("host_facts")
    assert seen["heavy"] == []
    fields = read_fingerprint().fields()
    assert seen["facts"] == {name: fields[name] for name in MACHINE}


def test_the_device_is_a_fact_only_if_it_is_given() -> None:
    assert "device" not in host_facts()
    assert host_facts("cuda:1")["device"] == "cuda"


def test_the_command_prints_json_or_writes_a_file_that_is_read_back(tmp_path: Path) -> None:
    runner = click.testing.CliRunner()
    printed = runner.invoke(facts, ["--device", "cpu"])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.output) == host_facts("cpu")
    written = runner.invoke(facts, ["--output", str(tmp_path / "node.json")])
    assert written.exit_code == 0, written.output
    assert read_host_facts(tmp_path / "node.json") == host_facts()
    assert isinstance(runner.invoke(facts, ["--output", str(tmp_path)]).exception, BadInputError)


def test_what_this_version_does_not_know_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text(to_json({**host_facts(), "kernel": "6.1"}))
    assert read_host_facts(tmp_path / "node.json") == host_facts()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{ not JSON", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "holds no facts of a host, but a list"),
        ("{}", "lacks 'arch', the processor architecture"),
        (to_json({name: value for name, value in host_facts().items() if name != "driver"}), "lacks 'driver'"),
        (json.dumps({**host_facts(), "gpu": None}), "'gpu' is None, no text"),
        (json.dumps({**host_facts(), "device": 1}), "'device' is 1, no text"),
    ],
)
def test_a_file_that_holds_no_facts_is_bad_input(tmp_path: Path, text: str | bytes, says: str) -> None:
    path = tmp_path / "node.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInputError, match=says) as caught:
        read_host_facts(path)
    assert "facts --output" in caught.value.next_step


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file"):
        read_host_facts(tmp_path / "node.json")
