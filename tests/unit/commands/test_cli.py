"""Test the command line: what runs without torch, its documentation, and its exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from chatterbox_prewarm import errors
from chatterbox_prewarm.bench.report.options import PARTS
from chatterbox_prewarm.cli import cli
from chatterbox_prewarm.commands.options import parse_alias
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.profiles import default_execution
from tests.conftest import ROOT, run_cli
from tests.helpers.states import make_state

if TYPE_CHECKING:
    from pathlib import Path

#: A program that runs the command line with only the base dependencies.
_BASE_INSTALLATION = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchaudio", "chatterbox", "transformers", "numba", "librosa", "numpy",
                                      "safetensors", "soundfile", "starlette", "uvicorn", "prometheus_client"}:
            raise ImportError(f"{name} is not part of the base installation")
sys.meta_path.insert(0, Block())
from chatterbox_prewarm.cli import main
main()
"""


def run_base_installation(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `chatterbox-prewarm ARGUMENTS` with only the base dependencies."""
    program = _BASE_INSTALLATION
    if arguments[0] == "verify":  # it looks for the sources of that package without importing it
        program = program.replace('"chatterbox", ', "")
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Write a small warm state."""
    make_state(tmp_path / "warm", {"numba": {"index.nbi": b"index"}})
    return tmp_path / "warm"


def test_inspect_and_pack_need_no_model_packages(state: Path, tmp_path: Path) -> None:
    shown = run_base_installation("inspect", "--warm", state)
    assert shown.returncode == 0, shown.stderr
    assert "numba" in shown.stdout
    packed = run_base_installation("pack", "--warm", state, "--output", tmp_path / "layer.tar.gz")
    assert packed.returncode == 0, packed.stderr
    assert (tmp_path / "layer.tar.gz").stat().st_size > 0


def test_a_command_that_needs_the_model_names_the_extra(tmp_path: Path) -> None:
    refused = run_base_installation("weights", "synthesize", tmp_path / "w", "--size", "mini")
    assert refused.returncode == 15
    assert "chatterbox-prewarm[model]" in refused.stderr


def test_verify_and_the_proof_of_an_image_need_no_model_packages(state: Path, tmp_path: Path) -> None:
    verified = run_base_installation("verify", "--warm", state, "--weights", tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert "numba: 1 file(s) intact" in verified.stdout
    refused = run_base_installation("prove", "--image", "no such image")
    assert refused.returncode == 14, refused.stderr
    fetched = run_base_installation("weights", "fetch", tmp_path / "weights", "--revision", "main")
    assert fetched.returncode == 2, fetched.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.IntegrityError("changed", next_step="bake"), 12),
        (OSError(28, "No space left on device"), 16),
        (ValueError("a bug"), 70),
    ],
)
def test_a_program_without_a_command_line_exits_with_the_same_codes(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, errors.exit_with_code():
        raise error
    assert ended.value.code == code
    assert "next:" in capsys.readouterr().err


def test_the_public_names_can_be_imported_before_torch() -> None:
    program = "import sys; from chatterbox_prewarm import *; assert 'torch' not in sys.modules; print(len(dir()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def all_commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Return every command and group below `group` by its full name."""
    commands = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        commands[f"{prefix}{name}"] = command
        if isinstance(command, click.Group):
            commands |= all_commands(command, f"{prefix}{name} ")
    return commands


def test_the_readme_lists_all_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| command |") : readme.index("Every option of `serve`")]
    listed = {name for row in table.splitlines() if row for name in _commands_of(row)}
    real = {name for name, command in all_commands(cli).items() if not hasattr(command, "commands")}
    assert listed == real


def _commands_of(row: str) -> set[str]:
    """Return the commands in a row of the table. In the row of a group, only the first command has the group's name."""
    names = re.findall(r"`([a-z0-9 -]+)`", row.split("|")[1])
    if not names:
        return set()
    group, _, first = names[0].rpartition(" ")
    return {f"{group} {name}".strip() for name in (first, *names[1:])}


def test_the_help_of_serve_names_the_environment_variable_of_every_option() -> None:
    serve = all_commands(cli)["serve"]
    shown = run_cli("serve", "--help").stdout
    assert len(serve.params) >= 12
    for option in serve.params:
        variable = str(option.envvar)
        assert variable.startswith("CHATTERBOX_PREWARM_"), option.name
        assert variable in shown.replace("\n", "").replace(" ", "")


def test_the_help_of_a_report_lists_all_parts() -> None:
    shown = " ".join(run_cli("bench", "report", "--help").stdout.split())
    assert f"Parts to measure: {', '.join(PARTS)}." in shown


def test_every_exit_code_is_in_the_help_and_in_the_readme() -> None:
    codes = {kind.exit_code for kind in errors.PrewarmError.__subclasses__()} | {errors.PrewarmError.exit_code}
    assert codes == {10, 11, 12, 13, 14, 15, 16, 70}
    for text in (run_cli("--help").stdout, (ROOT / "README.md").read_text()):
        line = " ".join(text.split())
        sentence = line[line.index("Exit codes: 0 ok") :][:200]
        assert {int(number) for number in re.findall(r"\d+", sentence.partition("bug")[0])} == codes | {0, 2}


def test_the_variables_of_the_kubernetes_manifests_are_options_of_serve() -> None:
    files = [path for path in (ROOT / "k8s").rglob("kustomization.yaml") if path.parent.name != "bake"]
    variables = {name for path in files for name in re.findall(r"- (CHATTERBOX_PREWARM_\w+)=", path.read_text())}
    assert variables
    assert variables <= {str(option.envvar) for option in all_commands(cli)["serve"].params}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--version"], 0), (["unknown"], 2), (["serve", "--port", "0"], 2), (["inspect", "--warm", "/nowhere"], 12)],
)
def test_the_exit_code_depends_on_the_kind_of_error(arguments: list[str], code: int) -> None:
    done = run_cli(*arguments)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_a_failed_proof_removes_the_evidence_of_an_earlier_one(state: Path, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence.json"
    evidence.write_text('{"passed": true}')
    (state / "manifest.json").unlink()
    refused = run_cli("prove", "--warm", state, "--weights", tmp_path, "--evidence", evidence)
    assert refused.returncode == 12, refused.stderr
    assert not evidence.exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(state: Path) -> None:
    refused = run_cli("prove", "--warm", state, "--evidence", "/proc/nowhere/evidence.json")
    assert refused.returncode == 16
    assert "next:" in refused.stderr


def test_float16_is_refused_on_a_cpu(tmp_path: Path) -> None:
    refused = run_cli("bake", "--t3-dtype", "float16", "--warm", tmp_path / "warm", "--weights", tmp_path)
    assert refused.returncode == 16
    assert "a CPU computes too slowly in float16" in refused.stderr
    assert default_execution("cuda", t3_dtype="float16").t3_dtype == "float16"


def test_graphs_are_refused_on_a_cpu(tmp_path: Path) -> None:
    refused = run_cli("bake", "--graphs", "--warm", tmp_path / "warm", "--weights", tmp_path)
    assert refused.returncode == 16
    assert "does not support CUDA graphs" in refused.stderr
    execution = default_execution("cuda:1")
    assert (execution.profile, execution.graphs) == ("aot", True)
    assert not default_execution("cuda", graphs=False).graphs
    assert not default_execution("cpu").graphs


def test_a_traceback_is_shown_only_with_debug(tmp_path: Path) -> None:
    assert "Traceback" in run_cli("--debug", "inspect", "--warm", tmp_path).stderr
    assert "Traceback" not in run_cli("inspect", "--warm", tmp_path).stderr


@pytest.mark.parametrize("name", ["alloy", "*", "Emily.wav", "John Smith", "voices/chatterbox/Alice.wav", "a=b"])
def test_a_voice_alias_can_be_any_text(name: str) -> None:
    assert parse_alias(f"{name}=fox") == (name, "fox")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("alloy", click.UsageError),
        ("=fox", click.UsageError),
        ("alloy=", BadInputError),
        ("alloy=*", BadInputError),
        ("alloy=a b", BadInputError),
    ],
)
def test_an_incomplete_voice_alias_is_refused(text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        parse_alias(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bake", "--levels", "one"], "is not a list of warm-up levels"),
        (["bake", "--voice", "fox"], "write --voice NAME=PATH"),
        (["bake", "--without", "everything"], "choose from: bytecode"),
        (["build", "--tag", "a:b", "--build-arg", "A"], "write --build-arg NAME=VALUE"),
        (["append", "--base", "a", "--to", "b", "--warm", "c", "--cmd", "'"], "close the quotes"),
        (["bench", "load", "--clients", "0", "--output", "{tmp}/load.json"], "write them as 1,4,16"),
        (["verify", "--host-facts", "node.json"], "add --image IMAGE"),
        (["weights", "synthesize", "{tmp}/w", "--size", "big"], "'big' is not one of"),
        (["weights", "fetch", "{tmp}/w", "--revision", "main"], "is not a full commit hash"),
        (["bake", "--device", "gpu"], "use the device cpu, cuda, or cuda:NUMBER"),
        (["verify", "--expect-digest", "sha256:12"], "is not a digest"),
        (["serve", "--allow-origin", "chat.example"], "write it as https://chat.example"),
        (["serve", "--allowed-host", "https://tts.example"], "write it as tts.example"),
        (["k8s", "render", "--image", "r.example/a:1", "--name", "A_1"], "lower-case letters, digits and hyphens"),
        (["bench", "startup", "--systems", "torch,ours", "--output", "{tmp}/s.json"], "choose from torch, upstream"),
    ],
)
def test_the_value_of_an_option_in_a_wrong_form_is_a_usage_error(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    refused = run_cli(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_during_the_imports_of_the_server_ends_it_quietly(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    (tmp_path / "click.py").write_text("import time; print('importing', flush=True); time.sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-m", "chatterbox_prewarm", "serve"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == code
