"""The ``fastq`` command: global options and sub-commands, each loaded when it is asked for. No work is done here.

The words, short forms and environment names are those of Celery's command line, so that unit files keep working.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from fastq.cli.errors import DEBUG_VARIABLE, Misuse, run_guarded
from fastq.version import __version__

if TYPE_CHECKING:
    from fastq.app import FastQ
    from fastq.cli.loader import Application
    from fastq.worker.place import Origin
    from fastq.worker.program import Program

COMMANDS = {
    "worker": "Run tasks until told to stop.",
    "call": "Send a task by name and print its id.",
    "result": "Print the result of a task.",
    "purge": "Delete every message that waits in the queues.",
    "status": "List the workers that are up.",
    "inspect": "Ask workers what they do.",
    "control": "Tell workers what to do.",
    "events": "Show what workers tell monitors.",
    "check": "Say which way each task takes, and which settings to look at.",
    "report": "Print versions, platform and settings for a bug report.",
}

#: Celery's own commands, which a Celery application has here too.
DELEGATED = frozenset({"amqp", "beat", "flower", "graph", "list", "logtool", "migrate", "multi", "shell", "upgrade"})
#: Those of them that make sense without an application.
APPLESS = frozenset({"logtool", "multi", "upgrade"})

#: Other names that options before the command have in the environment; FASTQ_<OPTION> and CELERY_<OPTION> go first.
VARIABLES = {
    "app": ["APP"],
    "broker": ["FASTQ_BROKER_URL", "CELERY_BROKER_URL", "BROKER_URL"],
    "result_backend": ["RESULT_BACKEND"],
    "loader": ["LOADER"],
    "config": ["CONFIG_MODULE"],
    "no_color": ["NO_COLOR"],
    "skip_checks": ["SKIP_CHECKS"],
}


@dataclass(slots=True)
class Globals:
    """The options that stand before the command. ``application`` is one that a program has handed over."""

    app: str = ""
    broker: str = ""
    result_backend: str = ""
    loader: str = ""
    config: str = ""
    color: bool | None = None
    quiet: bool = False
    application: Application | None = None

    def require_app(self) -> None:
        """Raise Misuse when no application was named."""
        if not self.app and self.application is None and not self._has_default_app():
            raise Misuse("no application given. Name it before the command: fastq -A <module>[:attribute] ...")

    def _has_default_app(self) -> bool:
        """Return whether the options describe Celery's default application: its configuration, loader or broker."""
        return bool(self.broker or self.config or self.loader) and find_spec("celery") is not None

    def load_any_app(self, runs: bool = False) -> Application:
        """Import the application and lay the given URLs and configuration over its own.

        Without -A, a broker URL alone makes an application that knows no tasks: enough to send, purge and ask. With a
        configuration, or when it ``runs``, as a worker or a beat, it is Celery's default application, as there.
        """
        if not self.broker:
            self.require_app()
        from fastq.app import FastQ
        from fastq.cli.loader import (
            add_working_directory,
            default_celery_app,
            find_any_app,
            import_module,
            is_celery,
        )

        self._tell_celery()
        add_working_directory()  # the application is there, or a broker of somebody's own
        if self.application is not None:
            return self.application
        own_name = sys.argv[0]
        if find_spec("celery") is not None:
            # Projects decide by it whether they are imported by a worker.
            sys.argv[0] = os.path.join(os.path.dirname(own_name), "celery")
        if self.app:
            app = find_any_app(self.app)
        elif self.config or self.loader or (runs and self._has_default_app()):
            app = default_celery_app(self.config)
        else:
            app = FastQ("fastq")
        if is_celery(app):
            return app
        sys.argv[0] = own_name
        if self.loader:
            raise Misuse("option --loader is for Celery applications; remove it")
        self.origin.lay_over(app, lambda name: import_module(name, f"--config {name}"))
        return app

    @property
    def origin(self) -> Origin:
        """Return how the application is found, for other interpreters."""
        from fastq.worker.place import Origin

        is_default = self.application is None and not self.app
        return Origin(self.app, self.config, self.broker, self.result_backend, is_default)

    def _tell_celery(self) -> None:
        """Set the variables by which a Celery application is told of these options, before it is imported."""
        for variable, value in (
            ("CELERY_LOADER", self.loader),
            ("CELERY_BROKER_URL", self.broker),
            ("CELERY_RESULT_BACKEND", self.result_backend),
            ("CELERY_CONFIG_MODULE", self.config),
        ):
            if value:
                os.environ[variable] = value

    def words(self) -> list[str]:
        """Return the options as they would stand before a command of Celery's."""
        named = (("-A", self.app), ("-b", self.broker), ("--result-backend", self.result_backend))
        more = (("--loader", self.loader), ("--config", self.config))
        flags = [flag for flag, given in (("-C", self.color is False), ("-q", self.quiet)) if given]
        return [word for option, value in (*named, *more) if value for word in (option, value)] + flags

    def load_app(self) -> FastQ:
        """Return the application for sending and asking; of a Celery application one that has its settings."""
        from fastq.app import FastQ

        app = self.load_any_app()
        if isinstance(app, FastQ):
            return app
        from fastq.celery.conf.settings import settings_of_app

        plain = FastQ(app.main)
        plain.conf = settings_of_app(app)
        return plain

    def load_program(self) -> Program:
        """Return the application as a worker runs it."""
        from fastq.app import FastQ

        app = self.load_any_app(runs=True)
        if isinstance(app, FastQ):
            from fastq.worker.program import FastQProgram

            return FastQProgram(app, self.origin)
        from fastq.celery.worker.program import CeleryProgram

        return CeleryProgram(app, self.origin)


class Commands(click.Group):
    """The group of sub-commands; each lives in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module and return the command; one of Celery's own runs there."""
        if cmd_name in COMMANDS:
            command: click.Command = importlib.import_module(f"fastq.cli.{cmd_name}").command
            _read_variables(command, f"{cmd_name}_")
            return command
        return Delegated(cmd_name) if cmd_name in DELEGATED or is_added(cmd_name) else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options before the command; where -A has taken the command for the application, Misuse says so."""
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            taken = next((name for option, name in pairwise(words) if option in ("-A", "--app")), "")
            if taken not in COMMANDS and taken not in DELEGATED:
                raise
            raise Misuse(
                f"-A has taken {taken!r} as the application's name, and {error.option_name} is no option before a "
                f"command. Name the application: fastq -A <module> {taken} {error.option_name} ..."
            ) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command; an unknown name raises UsageError that names the nearest known one."""
        import difflib

        name = args[0] if args else ""
        near = difflib.get_close_matches(name, COMMANDS, 1)
        if near and name not in (*COMMANDS, *DELEGATED) and not name.startswith("-") and not is_added(name):
            raise click.UsageError(f"no such command {name!r}. Did you mean {near[0]!r}?", ctx)
        return super().resolve_command(ctx, args)


class Delegated(click.Command):
    """A command of Celery's own. Its words are taken as they are; what they mean is known there."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words."""
        ctx.args = list(args)
        return []

    def invoke(self, ctx: click.Context) -> int:
        """Have Celery's command line run it; return the exit code. Raises Misuse where there is no Celery."""
        settings: Globals = ctx.obj
        name = str(self.name)
        app = self._application(settings)
        try:
            from fastq.celery.cli.commands import run as run_celery
        except ImportError:
            raise Misuse(f"command {name!r} is Celery's own, and Celery is not installed") from None
        return run_celery(app, name, ctx.args, settings.words())

    def _application(self, settings: Globals) -> Any:
        from fastq.cli.loader import is_celery

        if self.name in APPLESS and not settings.app:
            return settings.application  # Celery's command line can do without
        settings.require_app()
        app = settings.load_any_app(runs=True)
        if not is_celery(app):
            raise Misuse(f"command {self.name!r} is not carried by this version of fastq; it has {', '.join(COMMANDS)}")
        return app


def is_added(name: str) -> bool:
    """Return whether an installed package adds a command of this name to Celery's command line."""
    from importlib.metadata import entry_points

    return any(each.name == name for each in entry_points(group="celery.commands"))


def _read_variables(command: click.Command, prefix: str = "") -> None:
    """Let options come from the environment, under Celery's names too: CELERY_WORKER_CONCURRENCY."""
    for option in command.params:
        if isinstance(option, click.Option) and option.envvar is None and option.allow_from_autoenv and option.name:
            words = f"{prefix}{option.name}".upper()
            others = () if prefix else VARIABLES.get(option.name, ())
            names = (f"FASTQ_{words}", f"CELERY_{words}", *others)
            option.envvar = sorted(names, key=lambda name: not name.startswith("FASTQ_"))


def _from_file(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Return the URL of an option; everybody can see the command line, so it may name a file that holds the URL."""
    if not value.startswith("@"):
        return value
    try:
        with open(value[1:], encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Misuse(f"the file of {param.opts[0]} {value} cannot be read: {error}") from None


@click.group(
    cls=Commands,
    context_settings={"auto_envvar_prefix": "FASTQ", "help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option("-A", "--app", default="", help="Application: module or module:attribute.")
@click.option("-b", "--broker", default="", callback=_from_file, help="Broker URL; @FILE: the URL stands there.")
@click.option("--result-backend", default="", callback=_from_file, help="Result store URL, or @FILE.")
@click.option("--loader", default="", hidden=True, help="Loader class of a Celery application.")
@click.option("--config", default="", help="Configuration module.")
@click.option("--workdir", default="", help="Change to this directory first.")
@click.option("-C", "--no-color", is_flag=True, help="No colours, as with NO_COLOR=1.")
@click.option("-q", "--quiet", is_flag=True, help="Less output.")
@click.option("--debug", is_flag=True, help=f"Show the traceback of an error, as with {DEBUG_VARIABLE}=1.")
@click.option("--skip-checks", is_flag=True, hidden=True, help="Do not have Django check the project at start.")
@click.version_option(__version__, message="%(version)s")
@click.pass_context
def group(
    ctx: click.Context,
    app: str,
    broker: str,
    result_backend: str,
    loader: str,
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
    if skip_checks:
        os.environ["CELERY_SKIP_CHECKS"] = "true"
    if workdir:
        from fastq.worker.process.daemon import change_directory

        change_directory(workdir)
    color = False if no_color else None
    ctx.obj = Globals(app, broker, result_backend, loader, config, color, quiet, application=ctx.obj)


_read_variables(group)


def run(arguments: Sequence[str] | None = None, app: Application | None = None) -> int:
    """Run a command line and return its exit code. ``app`` stands for the one that -A would name."""
    return run_guarded(lambda: invoke(arguments, app))


def invoke(arguments: Sequence[str] | None = None, app: Application | None = None) -> int | None:
    """Run a command line and return its exit code. Raises what goes wrong instead of printing it."""
    code: int | None = group.main(arguments, prog_name="fastq", standalone_mode=False, obj=app)
    return code


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run())
