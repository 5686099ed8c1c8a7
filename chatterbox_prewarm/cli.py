"""The command line: the group of all commands, and how an error ends it."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

import click

from chatterbox_prewarm.commands import progress as shown
from chatterbox_prewarm.errors import as_prewarm_error
from chatterbox_prewarm.redaction import RedactedFormatter, print_traceback
from chatterbox_prewarm.system.json_subprocess import DEBUG
from chatterbox_prewarm.version import describe

if TYPE_CHECKING:
    from chatterbox_prewarm.serve.workers.worker_process import WorkerProcess

#: The commands as the help lists them, and the module of each in `commands/`.
_SECTIONS = {
    "State": {
        "weights": "weights",
        "bake": "states",
        "inspect": "states",
        "verify": "proofs",
        "prove": "proofs",
        "sign": "trust",
    },
    "Image": {
        "build": "builds",
        "pack": "states",
        "append": "images",
        "publish": "images",
        "attest": "images",
        "sbom": "trust",
        "dockerfile": "builds",
    },
    "Serve": {"serve": "serving"},
    "Cluster": {"k8s": "kube", "facts": "nodes"},
    "Machine": {"doctor": "doctor"},
    "Measure": {"bench": "bench"},
}
_MODULES = {name: module for section in _SECTIONS.values() for name, module in section.items()}


class _SectionedGroup(click.Group):
    """A group whose help lists the commands in sections.

    It imports a command when it is used, because a server would wait for the imports of all other commands.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of the commands; see `click.Group`."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command; see `click.Group`."""
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"chatterbox_prewarm.commands.{_MODULES[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections; see `click.Group`."""
        width = max(map(len, _MODULES))
        for title, section in _SECTIONS.items():
            commands = {name: self.get_command(ctx, name) for name in section}
            with formatter.section(f"{title} commands"):
                formatter.write_dl(
                    [
                        (name.ljust(width), command.get_short_help_str(80))
                        for name, command in commands.items()
                        if command
                    ]
                )


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"chatterbox-prewarm, version {describe()}")
        context.exit()


@click.group(
    cls=_SectionedGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and the commit.",
)
@click.option("--debug", is_flag=True, help="Show the log, and a traceback with an error.")
@click.option(
    "--progress/--quiet",
    default=None,
    help="Show the steps of a command and their times, or not. Default: only on a terminal.",
)
@click.pass_context
def cli(context: click.Context, /, *, debug: bool, progress: bool | None) -> None:
    """Bake warm caches for Chatterbox TTS, prove that they are used, and serve from them.

    Exit codes: 0 ok, 2 usage, 10 weights, 11 fingerprint mismatch, 12 integrity, 13 not warm, 14 engine or registry,
    15 model, 16 bad input, 70 bug.
    """
    from chatterbox_prewarm.commands import config_file

    configured = config_file.apply(context)
    progress = configured.get("progress", progress) if progress is None else progress
    debug = debug or configured.get("debug", False)
    handler = shown.LogHandler()
    handler.setFormatter(RedactedFormatter(f"{'%(asctime)s ' if debug else ''}%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])
    shown.start(progress=progress, debug=debug)
    if debug:
        os.environ[DEBUG] = "1"
    for noisy in ("httpx", "httpx2", "urllib3", "docker", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main(worker: WorkerProcess | None = None) -> None:
    """Run the command line. An error ends it with a message and an exit code, and with a traceback on request.

    Args:
        worker: for `serve`, a worker process that waits for its configuration.
    """
    try:
        cli(standalone_mode=False, obj=worker)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has ended, as with `| head`
    except Exception as error:  # noqa: BLE001 - every other error becomes a message too
        if os.environ.get(DEBUG):
            print_traceback()
        prewarm_error = as_prewarm_error(error)
        click.echo(f"error: {prewarm_error}", err=True)
        sys.exit(prewarm_error.exit_code)
