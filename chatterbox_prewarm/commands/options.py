"""Options that several commands share."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from chatterbox_prewarm.commands import progress
from chatterbox_prewarm.errors import BadInputError
from chatterbox_prewarm.model.profiles import PROFILES
from chatterbox_prewarm.model.text import check_voice_name
from chatterbox_prewarm.model.warmup.settings import check_levels
from chatterbox_prewarm.state.signature import Trust, parse_digest
from chatterbox_prewarm.system.devices import check_device_name
from chatterbox_prewarm.system.paths import CACHE, WARM, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PATH = click.Path(path_type=Path)


class Form(click.ParamType[str]):
    """A text whose form a function of this package checks. The command gets the text unchanged.

    The `BadInputError` of the function becomes a usage error, because the value cannot be right on any machine.

    Args:
        name: for the help.
        check: the function.
    """

    def __init__(self, name: str, check: Callable[[str], object]) -> None:
        self.name, self._check = name, check

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check a value; see `click.ParamType`. An empty text means that the option is not set."""
        try:
            if value:
                self._check(value)
        except BadInputError as error:
            raise click.BadParameter(str(error), ctx, param) from error
        return value


DEVICE = Form("device", check_device_name)


def option(name: str, *more: str, **settings: Any) -> Callable[[Any], Any]:
    """Make an option that can also be set as CHATTERBOX_PREWARM_NAME; the help shows the variable."""
    variable = "CHATTERBOX_PREWARM_" + name.removeprefix("--").replace("-", "_").upper()
    return click.option(name, *more, envvar=variable, show_envvar=True, show_default=True, **settings)


warm_option = option("--warm", type=PATH, default=WARM, help="Directory of a warm state, or of several.")
state_option = click.option("--state", help="Name of the state's directory, if --warm holds several states.")
start_device_option = option(
    "--device",
    type=DEVICE,
    help="Device used to select a state if --warm holds several. Default: the device each was baked for.",
)
weights_option = option("--weights", type=PATH, default=WEIGHTS, help="Directory of the checkpoint.")
cache_option = option("--cache", type=PATH, default=CACHE, help="Writable directory for compilers and Numba.")
insecure_option = click.option(
    "--insecure/--secure",
    default=None,
    help="Use HTTP or HTTPS for a registry. Default: HTTP only for this machine.",
)
device_option = option("--device", default="cpu", type=DEVICE, help="Torch device, such as cpu or cuda.")

targets_option = click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="GPU",
    help="Compile for this GPU without having it: a product, or sm_90; repeatable.",
)


def profile_option(default: str) -> Callable[[Any], Any]:
    """Make the option for the profile.

    Args:
        default: the default, as the help names it.
    """
    text = f"How the model runs: uncompiled, with torch.compile, or from AOTInductor packages. Default: {default}."
    return option("--profile", type=click.Choice(PROFILES), help=text)


def trust_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the trust options to a command, which gets them as one argument `trust`."""

    @functools.wraps(command)
    def with_trust(
        *args: Any, key: Path | None, signature: Path | None, expect_digest: str | None, **options: Any
    ) -> Any:
        return command(*args, trust=Trust(key=key, signature=signature, expected_digest=expect_digest), **options)

    wrapped: Callable[..., Any] = with_trust
    for add in (
        option(
            "--expect-digest",
            metavar="sha256:…",
            type=Form("digest", parse_digest),
            help="Required digest of the state's manifest.",
        ),
        option("--signature", type=PATH, help="Path of the state's signature. Default: next to the state, with .sig."),
        option("--key", type=PATH, help="Public key (PEM); the state must be signed with its private key."),
    ):
        wrapped = add(wrapped)
    return wrapped


def refuse_options(context: click.Context, names: Collection[str], reason: str) -> None:
    """Refuse options that the command line sets.

    Args:
        context: of the command.
        names: the options, as the command's function names them.
        reason: the end of the message.

    Raises:
        click.UsageError: one of them is set.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} cannot be used with {reason}.")


def check_output(path: Path) -> None:
    """Check that a result can be written, before the minutes that it takes to compute it.

    Raises:
        BadInputError: the path is a directory, or is inside a warm state or a checkpoint.
        OSError: the path cannot be written.
    """
    from chatterbox_prewarm.state.places import check_output_place

    check_output_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise BadInputError(f"{path} is a directory", next_step="name a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


signing_key_option = click.option(
    "--key",
    type=PATH,
    help="Private key (PEM). It signs the result of the proof and the provenance, which are attached too.",
)


def read_signing_key(path: Path | None) -> EllipticCurvePrivateKey | None:
    """Read the private key of `signing_key_option`. Its passphrase is in the environment.

    Raises:
        BadInputError: the key cannot be used.
    """
    if path is None:
        return None
    from chatterbox_prewarm.state.keys import PASSPHRASE, read_private_key

    return read_private_key(path, os.environ.get(PASSPHRASE) or None)


def note(line: str) -> None:
    """Print a remark for the user on standard error."""
    progress.end()
    click.echo(line, err=True)


_JSON = "chatterbox_prewarm.json"


def _remember_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[_JSON] = value


#: Option of the commands that print a result with `show`.
json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_remember_json, help="Print the result as JSON."
)


def wants_json() -> bool:
    """Return whether the present command was called with --json."""
    return bool(click.get_current_context().meta.get(_JSON))


def show(text: str, document: Mapping[str, Any]) -> None:
    """Print the result of a command on standard output: as text, or with --json as a document.

    Args:
        text: the result for people.
        document: the same for programs. Paths become text.
    """
    progress.end()
    click.echo(json.dumps(document, indent=1, sort_keys=True, default=str) if wants_json() else text)


def usage_error(message: str, next_step: str) -> click.UsageError:
    """Return the error for the value of an option that has the wrong form. Its exit code is 2."""
    return click.UsageError(f"{message}\n  next: {next_step}")


def parse_alias(text: str) -> tuple[str, str]:
    """Parse NAME=VOICE. NAME is any name that a client sends, such as `voices/Alice.wav`.

    Raises:
        click.UsageError: the text does not have this form.
        BadInputError: VOICE cannot name a voice.
    """
    name, separator, voice = text.rpartition("=")  # a voice has no "=" in its name
    if not separator:
        raise usage_error(f"--voice-alias {text!r} has no voice", "write --voice-alias NAME=VOICE")
    if not name:
        raise usage_error(f"--voice-alias {text!r} has no name", "write --voice-alias NAME=VOICE")
    return name, check_voice_name(voice)


def parse_voice(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH.

    Raises:
        click.UsageError: the text does not have this form.
    """
    name, separator, path = text.partition("=")
    if not separator or not path:
        raise usage_error(f"--voice {text!r} has no path", "write --voice NAME=PATH")
    return name, Path(path)


def parse_levels(text: str) -> tuple[int, ...]:
    """Parse a list of warm-up levels such as 1,2,3.

    Raises:
        click.UsageError: the text is not a list of levels.
    """
    try:
        return check_levels([int(level) for level in text.split(",")])
    except (ValueError, BadInputError):
        raise usage_error(f"{text!r} is not a list of warm-up levels", "use --levels 1,2,3") from None


def exit_on_sigterm() -> None:
    """Let SIGTERM end the command like Ctrl-C, so that unfinished work is cleaned up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def parse_pair(name_of_option: str, text: str) -> tuple[str, str]:
    """Parse NAME=VALUE.

    Args:
        name_of_option: the option, for the message.
        text: its value.

    Raises:
        click.UsageError: the text does not have this form.
    """
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise usage_error(f"{name_of_option} {text!r} has no value", f"write {name_of_option} NAME=VALUE")
    return name, value
