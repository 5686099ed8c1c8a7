"""Parse command lines with click, without running them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence


def parse(
    command: click.Command, name: str, arguments: Sequence[str], parent: click.Context | None = None
) -> click.Context:
    """Parse the arguments of a command, and those of its subcommand, as the program does.

    Args:
        command: the command or group.
        name: its name.
        arguments: the words after the name.
        parent: the context of the group that has this command.

    Returns:
        the context of the last subcommand. Its `command_path` has the names of all commands.

    Raises:
        click.UsageError: the program would refuse these arguments.
    """
    with command.make_context(name, list(arguments), parent=parent) as context:
        if not isinstance(command, click.Group):
            return context
        child_name, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert child is not None
        return parse(child, str(child_name), rest, context)
