"""The command line: the group of all commands, and how an error ends it."""

from __future__ import annotations

import logging
import os
import sys

import click

from chatterbox_prewarm.commands.bench import bench
from chatterbox_prewarm.commands.images import append, attest, build, dockerfile, publish
from chatterbox_prewarm.commands.kube import k8s
from chatterbox_prewarm.commands.nodes import facts
from chatterbox_prewarm.commands.serving import serve
from chatterbox_prewarm.commands.states import bake, inspect, pack, prove, verify
from chatterbox_prewarm.commands.trust import sbom, sign
from chatterbox_prewarm.commands.weights import weights
from chatterbox_prewarm.errors import as_prewarm_error
from chatterbox_prewarm.redaction import RedactedFormatter, print_traceback
from chatterbox_prewarm.system.json_subprocess import DEBUG
from chatterbox_prewarm.version import __version__

#: The commands as the help lists them.
_SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "State": (weights, bake, inspect, verify, prove, sign),
    "Image": (build, pack, append, publish, attest, sbom, dockerfile),
    "Serve": (serve,),
    "Cluster": (k8s, facts),
    "Measure": (bench,),
}


class _SectionedGroup(click.Group):
    """A group whose help lists the commands in sections."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the sections; see `click.Group`."""
        width = max(map(len, self.commands))
        for title, commands in _SECTIONS.items():
            with formatter.section(f"{title} commands"):
                rows = [(str(command.name).ljust(width), command.get_short_help_str(80)) for command in commands]
                formatter.write_dl(rows)


@click.group(
    cls=_SectionedGroup,
    commands={str(command.name): command for commands in _SECTIONS.values() for command in commands},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="chatterbox-prewarm")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(*, debug: bool) -> None:
    """Bake warm caches for Chatterbox TTS, prove that they are used, and serve from them.

    Exit codes: 0 ok, 2 usage, 10 weights, 11 fingerprint mismatch, 12 integrity, 13 not warm, 14 engine or registry,
    15 model, 16 bad input, 70 bug.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactedFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    if debug:
        os.environ[DEBUG] = "1"
    for noisy in ("httpx", "httpx2", "urllib3", "docker", "asyncio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Run the command line. An error ends it with a message and an exit code, and with a traceback on request."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has ended, as with `| head`
    except Exception as error:  # noqa: BLE001 - every other error becomes a message too
        if "--debug" in sys.argv:
            print_traceback()
        prewarm_error = as_prewarm_error(error)
        click.echo(f"error: {prewarm_error}", err=True)
        sys.exit(prewarm_error.exit_code)
