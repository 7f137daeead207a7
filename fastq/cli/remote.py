"""What ``inspect``, ``control`` and ``status`` share: which broker to ask, what the words mean, how replies are shown.

No application is imported for them: a broker URL is enough. What is printed is what Celery prints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pprint import pformat
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastq.brokers import SQLITE, find_broker
from fastq.cli import Globals
from fastq.cli.errors import Failure
from fastq.cli.options import name_list
from fastq.printable import cut, printable, printable_lines
from fastq.worker.process.exitcodes import EX_UNAVAILABLE

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.worker.remote.commands.command import Command

F = TypeVar("F", bound=Callable[..., Any])

MAX_NAME = 255
#: Chosen: of a reply of several lines, such as a report.
MAX_REPORT = 1 << 18
#: What an argument is to be, by the name of the function that reads it.
_EXPECTED = {"int": "a whole number", "float": "a number", "switch": "true or false"}


def remote_options(function: F) -> F:
    """Add the options of everything that asks workers."""
    for option in (
        click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("-d", "--destination", type=name_list, default="", metavar="A,B", help="Ask these nodes only."),
        click.option(
            "-t", "--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for replies."
        ),
    ):
        function = option(function)
    return function


def broker_settings(settings: Globals) -> Settings:
    """Return the settings that name the broker: of the application, or of the URL alone when there is none."""
    app = settings.load_app()
    app.finalize()
    return app.conf


def ask(
    settings: Settings, method: str, arguments: Mapping[str, Any], timeout_s: float, destination: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """Yield each node's reply as it comes. Raises SettingsError for a broker that carries no remote control."""
    from fastq.brokers import open_blocking_bus

    bus = open_blocking_bus(str(settings.broker_url), settings)
    try:
        yield from bus.ask(method, arguments, timeout_s, destination)
    finally:
        bus.close()


def nobody(settings: Settings, destination: Sequence[str]) -> Failure:
    """Return the error for a question without an answer; what is missing, where that can be known."""
    url, asked = str(settings.broker_url), ", ".join(destination)
    if find_broker(url) is not SQLITE:
        silent = "No nodes replied within time constraint" + (f", asked: {asked}" if asked else "")
        return Failure(f"{silent}; start a worker, or wait longer with -t", EX_UNAVAILABLE)
    from fastq.brokers.sqlite.broker import live_workers

    up = ", ".join(worker.name for worker in live_workers(url))
    if asked and up:
        return Failure(f"no worker named {asked} is up; up: {up}. Name one of these with -d", EX_UNAVAILABLE)
    return Failure(f"{no_worker_at(url)}. Start one there: fastq -A <module> worker", EX_UNAVAILABLE)


def no_worker_at(url: str) -> str:
    """Return what is said of an embedded broker that nobody works for: whether the file is there, and which one."""
    from fastq.brokers.sqlite.database import parse_url

    path = parse_url(url).path
    return f"no worker is up on {path}" + ("" if os.path.exists(path) else ", and there is no such file")


# --- words


def chosen_command(kind: str, name: str) -> Command:
    """Return the command of that kind and name. Raises UsageError that lists those there are."""
    from fastq.worker.remote.commands import commands_of

    known = commands_of(kind)
    if name not in known:
        raise click.UsageError(f"Command {name} not recognized. Available {kind} commands: {', '.join(known)}")
    return known[name]


def read_arguments(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """Return what the words after a command mean. Raises UsageError when they do not fit it."""
    if len(words) < command.signature.count("<") + command.least:
        raise click.UsageError(f"Missing argument; usage: {command.name} {command.signature}")
    named = list(zip(command.arguments, words, strict=False))
    rest = list(words[len(command.arguments) :])
    if rest and not command.variadic:
        takes = command.signature or "none"
        raise click.UsageError(f"Command {command.name!r} takes arguments: {takes}")
    arguments = {name: _typed(command, name, kind, word) for (name, kind), word in named}
    return {**arguments, command.variadic: rest} if command.variadic else arguments


def _typed(command: Command, name: str, kind: Callable[[str], Any], word: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        text = f"{command.name}: {name} is {word!r}, not {_EXPECTED[kind.__name__]}; usage: {command.signature}"
        raise click.UsageError(text) from None


def command_list(kind: str) -> str:
    """Return the commands of a kind with their arguments and what they do."""
    from fastq.worker.remote.commands import commands_of

    formatter = click.HelpFormatter()
    with formatter.section(f"{kind.capitalize()} Commands"):
        formatter.write_dl(
            [(f"{each.name} {each.signature}".strip(), each.help) for each in commands_of(kind).values()]
        )
    return formatter.getvalue()


def list_option(kind: str) -> Callable[[F], F]:
    """Add ``--list``, which prints the commands of a kind."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            click.echo(command_list(kind), nl=False)
            ctx.exit()

    return click.option(
        "--list", is_flag=True, is_eager=True, expose_value=False, callback=show, help="List the commands and exit."
    )


# --- showing


class Printer:
    """Prints replies in Celery's form."""

    def __init__(self, settings: Globals) -> None:
        self._color = settings.color
        self._is_quiet = settings.quiet

    def show(self, node: str, reply: Any, with_body: bool = True) -> None:
        """Print one node's reply."""
        mark, body = self._formatted(reply)
        arrow = "" if self._is_quiet else f"{click.style('->', fg='white', bold=True)} "
        self._echo(f"{arrow} {click.style(f'{printable(str(node), MAX_NAME)}: ', fg='cyan', bold=True)}{mark}")
        if with_body:
            self._echo(_indented("\n".join(map(cut, body.split("\n")))))

    def count(self, nodes: int) -> None:
        """Print how many nodes have replied."""
        if not self._is_quiet:
            self._echo(f"\n{nodes} {'node' if nodes == 1 else 'nodes'} online.")

    def _echo(self, text: str) -> None:
        click.echo(text, color=self._color)

    def _formatted(self, reply: Any) -> tuple[str, str]:
        good = click.style("OK", fg="green", bold=True)
        if isinstance(reply, list):
            star = click.style("*", fg="white")
            return good, "\n".join(f"{star} {printable(str(each))}" for each in reply) or "- empty -"
        if isinstance(reply, dict) and "ok" in reply:
            return good, _indented(self._formatted(reply["ok"])[1])
        if isinstance(reply, dict) and "error" in reply:
            return click.style("ERROR", fg="red", bold=True), _indented(self._formatted(reply["error"])[1])
        if isinstance(reply, dict):
            return good, json.dumps(reply, sort_keys=True, indent=4, default=str)
        # A report has several lines; whatever it says, they stay below the node's name.
        return good, printable_lines(cut(reply, MAX_REPORT)) if isinstance(reply, str) else pformat(reply)


def carry_out(
    settings: Globals, chosen: Command, words: Sequence[str], timeout_s: float, destination: Sequence[str], shows: bool
) -> list[tuple[str, Any]]:
    """Send a command and return each node's reply, printed as it comes when ``shows``. Raises Failure without any."""
    arguments = read_arguments(chosen, words)
    printer = Printer(settings)
    replies = []
    for node, reply in ask(broker_settings(settings), chosen.name, arguments, timeout_s, destination):
        replies.append((node, reply))
        if shows:
            printer.show(node, reply)
    if not replies:
        raise nobody(broker_settings(settings), destination)
    return replies


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
