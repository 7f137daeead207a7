"""The ``fastq`` command: global options and sub-commands, each loaded when it is asked for. No work is done here.

The words, short forms and environment names are those of Celery's command line, so that unit files keep working.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fastq import __version__
from fastq.cli.errors import DEBUG_VARIABLE, Misuse, run_guarded

if TYPE_CHECKING:
    from fastq.app import FastQ

COMMANDS = {
    "worker": "Run tasks until told to stop.",
    "call": "Send a task by name and print its id.",
    "result": "Print the result of a task.",
    "purge": "Delete every message that waits in the queues.",
    "status": "List the workers that are up.",
}

#: Celery's commands that are still to come.
NOT_CARRIED = frozenset(
    {"amqp", "beat", "control", "events", "flower", "graph", "inspect", "list"}
    | {"logtool", "migrate", "multi", "report", "shell", "upgrade"}
)

BROKER_VARIABLES = ["FASTQ_BROKER", "FASTQ_BROKER_URL", "BROKER_URL"]
RESULT_VARIABLES = ["FASTQ_RESULT_BACKEND", "RESULT_BACKEND"]


@dataclass(slots=True)
class Globals:
    """The options that stand before the command."""

    app: str = ""
    broker: str = ""
    result_backend: str = ""
    config: str = ""
    color: bool | None = None
    quiet: bool = False

    def require_app(self) -> None:
        """Raise Misuse when no application was named."""
        if not self.app:
            raise Misuse("no application given. Name it before the command: fastq -A <module>[:attribute] ...")

    def load_app(self) -> FastQ:
        """Import the application and lay the given URLs and configuration over its own.

        Without -A, a broker URL alone makes an application that knows no tasks: enough to send, purge and ask.
        """
        if not self.broker:
            self.require_app()
        from fastq.app import FastQ
        from fastq.cli.loader import find_app, import_module

        app = find_app(self.app) if self.app else FastQ("fastq")
        if self.config:
            app.config_from_object(import_module(self.config, f"--config {self.config}"))
        if self.broker:
            app.conf.broker_url = self.broker
        if self.result_backend:
            app.conf.result_backend = self.result_backend
        return app


class Commands(click.Group):
    """The group of sub-commands; each lives in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return the command. Raises Misuse for one of Celery's that is not carried."""
        if cmd_name in COMMANDS:
            command: click.Command = importlib.import_module(f"fastq.cli.{cmd_name}").command
            return command
        if cmd_name in NOT_CARRIED:
            raise Misuse(f"command {cmd_name!r} is not carried by this version of fastq; it has {', '.join(COMMANDS)}")
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command; an unknown name raises UsageError that names the nearest known one."""
        import difflib

        name = args[0] if args else ""
        near = difflib.get_close_matches(name, COMMANDS, 1)
        if near and name not in COMMANDS and name not in NOT_CARRIED and not name.startswith("-"):
            raise click.UsageError(f"no such command {name!r}. Did you mean {near[0]!r}?", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"auto_envvar_prefix": "FASTQ", "help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("-A", "--app", default="", envvar=["FASTQ_APP", "APP"], help="Application: module or module:attribute.")
@click.option("-b", "--broker", default="", envvar=BROKER_VARIABLES, help="Broker URL.")
@click.option("--result-backend", default="", envvar=RESULT_VARIABLES, help="Result store URL.")
@click.option("--config", default="", envvar=["FASTQ_CONFIG", "CONFIG_MODULE"], help="Configuration module.")
@click.option("--workdir", default="", help="Change to this directory first.")
@click.option("-C", "--no-color", is_flag=True, help="No colours, as with NO_COLOR=1.")
@click.option("-q", "--quiet", is_flag=True, help="Less output.")
@click.option("--debug", is_flag=True, help=f"Show the traceback of an error, as with {DEBUG_VARIABLE}=1.")
@click.option("--skip-checks", is_flag=True, hidden=True, help="Accepted for unit files; there are no such checks.")
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def group(
    ctx: click.Context,
    app: str,
    broker: str,
    result_backend: str,
    config: str,
    workdir: str,
    no_color: bool,
    quiet: bool,
    debug: bool,
    skip_checks: bool,
) -> None:
    """fastq: a task queue for Python."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"
    if workdir:
        from fastq.worker.daemon import change_directory

        change_directory(workdir)
    ctx.obj = Globals(app, broker, result_backend, config, False if no_color else None, quiet)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return run_guarded(lambda: group.main(arguments, prog_name="fastq", standalone_mode=False))


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run())
