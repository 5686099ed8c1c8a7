"""Test that the facts of a node are read without importing heavy packages, and that invalid files are refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click.testing
import pytest

from chatterbox_prewarm.commands.nodes import facts
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.state.node_facts import node_facts, node_facts_to_json, read_node_facts
from chatterbox_prewarm.system.fingerprint import MACHINE, read_fingerprint
from tests.helpers.children import call

if TYPE_CHECKING:
    from pathlib import Path


def test_the_facts_are_those_of_the_fingerprint_and_no_heavy_package_is_imported() -> None:
    report = call("read_facts")
    assert report["heavy"] == []
    fields = read_fingerprint().fields()
    assert report["facts"] == {name: fields[name] for name in MACHINE}


def test_the_device_is_a_fact_only_if_it_is_given() -> None:
    assert "device" not in node_facts()
    assert node_facts("cuda:1")["device"] == "cuda"


def test_the_command_prints_json_or_writes_a_file_that_can_be_read(tmp_path: Path) -> None:
    runner = click.testing.CliRunner()
    printed = runner.invoke(facts, ["--device", "cpu"])
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.output) == node_facts("cpu")
    written = runner.invoke(facts, ["--output", str(tmp_path / "node.json")])
    assert written.exit_code == 0, written.output
    assert read_node_facts(tmp_path / "node.json") == node_facts()
    assert isinstance(runner.invoke(facts, ["--output", str(tmp_path)]).exception, BadInputError)


def test_unknown_facts_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "node.json").write_text(node_facts_to_json({**node_facts(), "kernel": "6.1"}))
    assert read_node_facts(tmp_path / "node.json") == node_facts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ not JSON", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "holds a list instead of the facts of a node"),
        ("{}", "lacks 'arch', the processor architecture"),
        (
            node_facts_to_json({name: value for name, value in node_facts().items() if name != "driver"}),
            "lacks 'driver'",
        ),
        (json.dumps({**node_facts(), "gpu": None}), "'gpu' is None, which is not a string"),
        (json.dumps({**node_facts(), "device": 1}), "'device' is 1, which is not a string"),
    ],
)
def test_a_file_without_valid_facts_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "node.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInputError, match=message) as caught:
        read_node_facts(path)
    assert "facts --output" in caught.value.next_step


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file"):
        read_node_facts(tmp_path / "node.json")
