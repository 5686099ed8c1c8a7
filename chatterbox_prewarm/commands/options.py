"""Options that several commands share, and how a command writes its result."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.model.text import ANY, check_voice_name
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = click.Path(path_type=Path)


def option(name: str, *more: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that the environment can set as CHATTERBOX_PREWARM_NAME, shown in the help."""
    variable = "CHATTERBOX_PREWARM_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *more, envvar=variable, show_envvar=True, show_default=True, **settings)


warm_option = option("--warm", type=PATH, default=WARM, help="The warm state's directory, or a folder of states.")
state_option = click.option("--state", help="Which state of a folder of several, by the name of its own folder.")
start_device_option = option(
    "--device", help="What a state of a folder of several is chosen for; for each its own device by default."
)
weights_option = option("--weights", type=PATH, default=WEIGHTS, help="The checkpoint's directory.")
cache_option = option("--cache", type=PATH, default=CACHE, help="A writable directory for compilers and Numba.")
insecure_option = click.option(
    "--insecure/--secure",
    default=None,
    help="Plain HTTP, or HTTPS, to a registry; by default plain to this machine alone.",
)
device_option = option("--device", default="cpu", help="The torch device, such as cpu or cuda.")


def profile_option(default: str) -> Callable[[Any], Any]:
    """The profile; `default` is what the help calls what is taken without it."""
    text = f"How the model executes: as written, through torch.compile, or ahead of time; {default} by default."
    return option("--profile", type=click.Choice(PROFILES), help=text)


def trust_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a state is trusted by, given from outside of it."""
    for add in (
        option("--expect-digest", metavar="sha256:…", help="The state's manifest must have this digest."),
        option("--signature", type=PATH, help="The state's signature; beside the state, with .sig, by default."),
        option("--key", type=PATH, help="The state must be signed with the private key of this public one (PEM)."),
    ):
        command = add(command)
    return command


def check_place(path: Path) -> None:
    """Make sure that a result can be written, before the minutes that it takes to get it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise BadInputError(f"{path} is a directory", next_step="name a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def say(line: str) -> None:
    """Show a line of progress, apart from the result."""
    click.echo(line, err=True)


def parse_alias(text: str) -> tuple[str, str]:
    """The name and the voice of NAME=VOICE.

    Raises:
        BadInputError: it is not of that form.
    """
    name, separator, voice = text.partition("=")
    if not separator:
        raise BadInputError(f"--voice-alias {text!r} has no voice", next_step="write --voice-alias NAME=VOICE")
    return name if name == ANY else check_voice_name(name), check_voice_name(voice)


def parse_voice(text: str) -> tuple[str, Path]:
    """Name and clip of NAME=PATH.

    Raises:
        BadInputError: it is not of that form.
    """
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise BadInputError(f"--voice {text!r} has no path", next_step="write --voice NAME=PATH")
    return name, Path(path)
