"""The configuration file of the command line: values for options, by command.

    [bake]
    device = "cuda"
    voice = ["fox=clips/fox.wav"]

    [weights.fetch]
    variant = "multilingual"

A key is the name of an option without its dashes. An option on the command line and its environment variable take
precedence. The file `prewarm.toml` is another one: it lists the bakes of an image (`image/matrix.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chatterbox_prewarm.errors import BadInputError, from_os_error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

NAME = "chatterbox-prewarm.toml"
#: The table of the configuration in a pyproject.toml, and the name of that file.
_PROJECT, _TABLE = "pyproject.toml", "chatterbox-prewarm"
#: Tables of the other file.
_OF_MATRIX = {"image"}


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """The content of a configuration file.

    Attributes:
        source: the file, and the table of a pyproject.toml, for messages.
        tables: the keys and tables.
    """

    source: str
    tables: Mapping[str, Any]

    def defaults(
        self, command: click.Command, context: click.Context, tables: Mapping[str, Any], path: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Return values for the options of a command, and of the commands of a group, as click's `default_map`.

        Args:
            command: the command.
            context: a context of it.
            tables: its keys and tables.
            path: the keys above them.

        Raises:
            BadInputError: a key is not an option, or its value has the wrong type.
        """
        parameters = _options(command)
        found: dict[str, Any] = {}
        for key, value in tables.items():
            place = (*path, key)
            below = command.get_command(context, key) if isinstance(command, click.Group) else None
            if below is not None:
                if not isinstance(value, dict):
                    raise self._invalid(place, f"must be a table with options of the command {key}")
                found[key] = self.defaults(below, click.Context(below, parent=context, info_name=key), value, place)
            elif key in parameters:
                parameter = parameters[key]
                found[str(parameter.name)] = self._value(place, parameter, value, context)
            else:
                known = [*parameters, *(command.list_commands(context) if isinstance(command, click.Group) else ())]
                raise self._unknown(place, known)
        return found

    def own(self, command: click.Group, context: click.Context) -> dict[str, Any]:
        """Return values for the options of the program itself, and check that every table is of a command.

        Raises:
            BadInputError: as `defaults`.
        """
        names = command.list_commands(context)
        options = {key: value for key, value in self.tables.items() if key not in names}
        for key, value in self.tables.items():
            if isinstance(value, list) or key in _OF_MATRIX:
                raise BadInputError(
                    f"{self.source} has the table {key!r} of a list of bakes",
                    next_step=f"move [image] and [[bake]] to prewarm.toml; {NAME} has one table [bake] for the options "
                    "of `bake`",
                )
            if key in names and not isinstance(value, dict):
                raise self._invalid((key,), f"must be a table with options of the command {key}")
        if unknown := options.keys() - _options(command).keys():
            raise self._unknown((min(unknown),), [*_options(command), *names])
        return self.defaults(command, context, options)

    def _value(self, place: tuple[str, ...], option: click.Option, value: object, context: click.Context) -> object:
        wanted = _type_name(option)
        if not _has_type(option, value):
            raise self._invalid(place, f"must be {wanted}, and is {value!r}")
        try:
            option.type_cast_value(context, value)
        except click.UsageError as error:
            raise self._invalid(place, f"cannot be used: {error.message}") from error
        return value

    def _invalid(self, place: tuple[str, ...], problem: str) -> BadInputError:
        return BadInputError(f"{self.source}: {'.'.join(place)} {problem}", next_step="correct this key")

    def _unknown(self, place: tuple[str, ...], known: Collection[str]) -> BadInputError:
        return BadInputError(
            f"{self.source}: unknown key {'.'.join(place)}",
            next_step=f"use one of: {', '.join(get_close_matches(place[-1], known, cutoff=0.5) or sorted(known))}",
        )


def read_config_file(folder: Path) -> ConfigFile | None:
    """Read the configuration in a folder: `chatterbox-prewarm.toml`, or else the table in `pyproject.toml`.

    A `pyproject.toml` may belong to another project, so it is left out with a warning if it cannot be read.

    Raises:
        BadInputError: `chatterbox-prewarm.toml` cannot be read or is not TOML, or the table has another type.
    """
    path = folder / NAME
    if (tables := _read(path)) is not None:
        return ConfigFile(source=str(path), tables=tables)
    path = folder / _PROJECT
    try:
        tool = (_read(path) or {}).get("tool", {})
    except BadInputError as error:
        _report_left_out(error.message)
        return None
    if not isinstance(tool, dict):
        _report_left_out(f"{path}: `tool` is not a table")
        return None
    tables = tool.get(_TABLE)
    if tables is None:
        return None
    source = f"{path} [tool.{_TABLE}]"
    if not isinstance(tables, dict):
        raise BadInputError(f"{source} is not a table", next_step="write it as a table")
    return ConfigFile(source=source, tables=tables)


def _report_left_out(problem: str) -> None:
    # The file can set --debug, so it is read before the log is set up.
    click.echo(f"WARNING: {problem}; continuing without this file", err=True)


def apply(context: click.Context) -> dict[str, Any]:
    """Use the configuration file of the working directory for the command that this context calls.

    Only the table of that command is checked, because the others would have to be imported.

    Args:
        context: of the program. It gets the defaults of the command.

    Returns:
        values for the options of the program itself.

    Raises:
        BadInputError: the file cannot be used.
    """
    file = read_config_file(Path())
    group, name = context.command, context.invoked_subcommand
    if file is None or not isinstance(group, click.Group):
        return {}
    own = file.own(group, context)
    if name is not None and name in file.tables:
        context.default_map = file.defaults(group, context, {name: file.tables[name]})
    return own


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInputError(f"{path} is not TOML: {error}", next_step="correct its syntax") from error
    except OSError as error:
        raise from_os_error(error, f"reading the configuration file {path}") from error


def _options(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command that a file can set, by their keys."""
    return {
        max(parameter.opts, key=len).removeprefix("--"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.is_eager
    }


def _type_name(option: click.Option) -> str:
    if option.is_flag:
        return "true or false"
    one = {"integer": "a whole number", "integer range": "a whole number", "float range": "a number"}.get(
        option.type.name, "a text"
    )
    if option.nargs > 1:
        return f"a list of {option.nargs} texts"
    return "a list of texts" if option.multiple else one


def _has_type(option: click.Option, value: object) -> bool:
    if option.is_flag:
        return isinstance(value, bool)
    if option.multiple or option.nargs > 1:
        if not isinstance(value, list) or (option.nargs > 1 and len(value) != option.nargs):
            return False
        return all(isinstance(each, str) for each in value)
    if option.type.name.startswith("integer"):
        return type(value) is int
    if option.type.name.startswith("float"):
        return type(value) in {int, float}
    return isinstance(value, str)
