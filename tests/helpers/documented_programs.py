"""Check commands as the documentation has them, without running them.

click parses each command of this project. `programs` declares the other programs whose arguments name files, targets or
stages of the repository, and `UNCHECKED` lists the rest. A program that is in neither of them is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from benchmarks.__main__ import benchmarks
from chatterbox_prewarm.cli import cli
from tests.conftest import ROOT
from tests.helpers.command_line import parse
from tests.helpers.shell import Command

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Programs of this project, and their commands.
OURS: dict[str, click.Group] = {
    "chatterbox-prewarm": cli,
    "python -m chatterbox_prewarm": cli,
    "python -m benchmarks": benchmarks,
}
#: Programs of which only the name is checked, by the reason.
UNCHECKED = {
    "the shell runs it": "eval, printf, source, umask",
    "it handles the reader's files": "grep, jq, mkdir, openssl, tar",
    "it installs packages": "apt-get, pip",
    "it sends a request to a server": "curl",
    "it handles images by name": "docker create, docker export, docker inspect, docker push, docker save, kind load, "
    "podman load",
    "it needs a cloud account": "eksctl create, gcloud container",
    "it handles objects of a cluster": "kubectl cordon, kubectl create, kubectl delete, kubectl get, kubectl logs, "
    "kubectl port-forward, kubectl rollout, kubectl set, kubectl wait",
}
UNCHECKED_NAMES = {name for names in UNCHECKED.values() for name in names.split(", ")}
#: Paths that are not in the repository, and their origin.
ELSEWHERE = {
    "-": "standard input",
    "out": "`make demo` and `bake` write it",
    "k8s/overlays/mine": "docs/kubernetes.md tells the reader to write it",
    "nvidia/gpu-operator": "a Helm chart in the repository of NVIDIA",
}


@dataclass(kw_only=True)
class Block:
    """A block of commands, which run one after another in one shell.

    Attributes:
        directory: the working directory of the next command.
        made: files that the commands have written.
    """

    directory: Path = ROOT
    made: set[Path] = field(default_factory=set)

    def find(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            click.UsageError: there is no such file.
        """
        path = self.directory / name
        elsewhere = any(PurePath(name).is_relative_to(other) for other in ELSEWHERE)
        if not (elsewhere or path in self.made or path.exists()):
            raise click.UsageError(f"the path {name} does not exist")
        return path

    def check(self, command: Command) -> str:
        """Check a command, and return its name, with the names of its subcommands where they are known.

        Raises:
            click.UsageError: the command is wrong, or no table has its program.
        """
        self.made |= {self.directory / name for name in command.writes}
        program, arguments = PurePath(command.words[0]).name, command.words[1:]
        if program == "python" and arguments[:1] == ["-m"]:
            program, arguments = " ".join([program, *arguments[:2]]), arguments[2:]
        if program in OURS:
            return _check_ours(program, arguments, command.variables)
        name = " ".join([program, *arguments[:1]])
        if found := {program, name} & UNCHECKED_NAMES:
            return found.pop()
        if program not in programs.commands:
            raise click.UsageError(f"no table in {Path(__file__).name} has the program {program}")
        programs.main([program, *arguments], prog_name="", standalone_mode=False, obj=self)
        return name if isinstance(programs.commands[program], click.Group) else program


def _check_ours(program: str, arguments: list[str], variables: dict[str, str]) -> str:
    if shell := variables.get("_CHATTERBOX_PREWARM_COMPLETE"):
        if arguments or get_completion_class(shell.removesuffix("_source")) is None:
            raise click.UsageError(f"there is no completion for {shell}")
        return program
    try:
        context = parse(OURS[program], program, arguments)
    except click.exceptions.Exit:  # --help or --version
        return program
    if context.info_name in {"build", "dockerfile"}:
        _check_build_arguments(context.params["arguments"], ROOT / "Dockerfile")
    return context.command_path


def _check_build_arguments(arguments: Iterable[str], dockerfile: Path) -> None:
    known = re.findall(r"^ARG (\w+)", dockerfile.read_text("utf-8"), re.MULTILINE)
    for argument in arguments:
        name = argument.partition("=")[0]
        if name not in known:
            raise click.UsageError(f"{dockerfile.name} has no build argument {name}")


class RepositoryPath(click.ParamType[Path]):
    """A path that exists in the repository, or that an earlier command of the block has written.

    Args:
        content: a file that must be in the directory with this path.
    """

    name = "path"

    def __init__(self, content: str = "") -> None:
        self._content = content

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        """Find the path; see `click.ParamType`."""
        assert ctx is not None
        path: Path = ctx.obj.find(value)
        if self._content:
            ctx.obj.find(str(PurePath(value, self._content)))
        return path


_REST: dict[str, Any] = {"nargs": -1, "type": click.UNPROCESSED}
_IN_ORDER = {"allow_interspersed_args": False}


@click.group(context_settings={"help_option_names": []})
def programs() -> None:
    """Programs whose arguments are checked, with the options that the documentation uses."""


@programs.command("make")
@click.argument("words", nargs=-1)
def _make(words: tuple[str, ...]) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^([\w-]+):", text, re.MULTILINE)
    variables = re.findall(r"(?<!\$)\$\((\w+)\)", text)
    for word in words:
        name, is_variable, _ = word.partition("=")
        if name not in (variables if is_variable else targets):
            raise click.UsageError(f"the Makefile has no {'variable' if is_variable else 'target'} {name}")


@programs.command("cd")
@click.argument("directory", type=RepositoryPath())
@click.pass_obj
def _cd(block: Block, /, *, directory: Path) -> None:
    block.directory = directory


@programs.command("cp")
@click.argument("source", type=RepositoryPath())
@click.argument("target")
@click.pass_obj
def _cp(block: Block, /, *, source: Path, target: str) -> None:  # noqa: ARG001
    block.made.add(block.directory / target)


@programs.command("python -m pytest")
@click.argument("paths", nargs=-1, required=True, type=RepositoryPath())
def _pytest(**_: Any) -> None: ...


@programs.group("docker")
def _docker() -> None: ...


@_docker.command("build")
@click.option("-t", "--tag", required=True)
@click.option("-f", "--file", type=RepositoryPath())
@click.option("--build-arg", "arguments", multiple=True)
@click.option("--target")
@click.option("--secret", multiple=True)
@click.argument("folder", type=RepositoryPath())
def _docker_build(*, file: Path | None, arguments: tuple[str, ...], target: str | None, folder: Path, **_: Any) -> None:
    dockerfile = file or folder / "Dockerfile"
    if dockerfile.name == "-":
        return
    _check_build_arguments(arguments, dockerfile)
    stages = re.findall(r"^FROM .* AS (\S+)$", dockerfile.read_text("utf-8"), re.MULTILINE)
    if target and target not in stages:
        raise click.UsageError(f"{dockerfile.name} has no stage {target}")


@_docker.command("run", context_settings=_IN_ORDER)
@click.option("--rm", is_flag=True)
@click.option("--read-only", is_flag=True)
@click.option("-p", "--publish", multiple=True)
@click.option("--tmpfs", multiple=True)
@click.option("--network")
@click.option("--user")
@click.option("--cap-drop")
@click.argument("image")
@click.argument("command", **_REST)
@click.pass_obj
def _docker_run(block: Block, /, *, image: str, command: tuple[str, ...], **_: Any) -> None:
    if re.split("[:@]", image.rpartition("/")[2])[0] not in {"chatterbox", "speech"}:
        return
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    (entrypoint,) = set(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE))
    (default,) = set(re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE))
    block.check(Command(words=[*json.loads(entrypoint), *(command or json.loads(default))]))


@_docker.command("compose", context_settings=_IN_ORDER)
@click.argument("command", type=click.Choice(["build", "up"]))
@click.argument("arguments", **_REST)
@click.pass_obj
def _docker_compose(block: Block, /, **_: Any) -> None:
    block.find("compose.yaml")


@programs.group("kubectl")
def _kubectl() -> None: ...


@_kubectl.command("apply")
@click.option("-f", "--filename", type=RepositoryPath())
@click.option("-k", "--kustomize", type=RepositoryPath("kustomization.yaml"))
def _kubectl_apply(*, filename: Path | None, kustomize: Path | None) -> None:
    if not filename and not kustomize:
        raise click.UsageError("kubectl apply needs -f or -k")


@_kubectl.command("kustomize")
@click.argument("directory", type=RepositoryPath("kustomization.yaml"))
def _kubectl_kustomize(**_: Any) -> None: ...


@_kubectl.command("exec", context_settings=_IN_ORDER)
@click.argument("pod")
@click.argument("separator", type=click.Choice(["--"]))
@click.argument("command", required=True, **_REST)
@click.pass_obj
def _kubectl_exec(block: Block, /, *, command: tuple[str, ...], **_: Any) -> None:
    block.check(Command(words=list(command)))


@programs.group("helm")
def _helm() -> None: ...


@_helm.command("install")
@click.option("-f", "--values", multiple=True, type=RepositoryPath())
@click.option("--set", multiple=True)
@click.option("--namespace")
@click.option("--create-namespace", is_flag=True)
@click.argument("release")
@click.argument("chart", type=RepositoryPath("Chart.yaml"))
def _helm_install(**_: Any) -> None: ...
