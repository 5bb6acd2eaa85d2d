"""The command `isentrope`: finds its subcommands by entry points, and turns our exceptions into one
line.

common imports neither actor nor learner: a subcommand is imported by name when it is called, or
when the help needs its one-line summary. Their modules import click and configuration only; torch
waits in the function bodies.
"""

from __future__ import annotations

import functools
import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, NoReturn

import click

from common.errors import IsentropeError

GROUP = "isentrope.commands"
PATHS: dict[type[OSError], str] = {  # a full disk, a lost file system keep their traceback
    FileNotFoundError: "is it spelled right, and is its folder there?",
    FileExistsError: "move it away, or name another place",
    IsADirectoryError: "name a file",
    NotADirectoryError: "name a folder",
    PermissionError: "may this user read and write there?",
}


class Subcommands(click.Group):
    """A group whose commands are entry points; one that cannot be imported does not break the
    others."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [entry.name for entry in _entries()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in _entries():
            if entry.name == cmd_name:
                return _load(entry)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Whole sentences, where click's own list cuts them at the end of a line."""
        commands = [_load(entry) for entry in sorted(_entries(), key=lambda entry: entry.name)]
        with formatter.section("Commands"):
            formatter.write_dl([(str(c.name), c.get_short_help_str(limit=200)) for c in commands])


@functools.cache  # a look at every installed distribution, and the help asks once a command
def _entries() -> tuple[EntryPoint, ...]:
    return tuple({entry.name: entry for entry in entry_points(group=GROUP)}.values())


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except (ImportError, AttributeError, SyntaxError) as error:
        return _broken(entry, error)
    assert isinstance(command, click.Command), f"{entry.value} is no click command"
    return command


def _broken(entry: EntryPoint, error: Exception) -> click.Command:
    """Stands where a command should: says why it cannot be loaded when it is called."""
    why = f"cannot be loaded: {type(error).__name__}: {error}"

    def say(args: tuple[str, ...]) -> None:
        raise click.ClickException(f"`isentrope {entry.name}` {why}")

    anything: dict[str, Any] = {"ignore_unknown_options": True, "help_option_names": []}
    rest = click.Argument(["args"], nargs=-1, type=click.UNPROCESSED)
    return click.Command(
        entry.name, callback=say, params=[rest], short_help=f"({why})", context_settings=anything
    )


@click.group(cls=Subcommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("isentrope"), prog_name="isentrope")
def isentrope() -> None:
    """Reinforcement learning for language models: asynchronous, exact, at the entropy you ask for.

    Start with: isentrope run tiny
    """


def standalone(command: click.Command, name: str | None = None) -> None:
    """Run a command as a process' main: our errors, and a path that is none, are one line on stderr
    and an exit code.
    """
    try:
        command.main(prog_name=name)
    except IsentropeError as error:
        _end(name or command.name, str(error), error.exit_code)
    except tuple(PATHS) as error:
        if error.filename is None:
            raise
        advice = PATHS[type(error)]
        _end(name or command.name, f"{error.filename}: {error.strerror}; {advice}", 2)


def _end(name: str | None, said: str, exit_code: int) -> NoReturn:
    click.echo(f"{name}: {' '.join(said.split())}", err=True)
    sys.exit(exit_code)


def main() -> None:
    standalone(isentrope, "isentrope")
