"""How a command ends: every error becomes one line on standard error that names the remedy, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import click
from click.core import ParameterSource

from fastq.errors import FastqError
from fastq.printable import printable
from fastq.worker.process.exitcodes import EX_FAILURE, EX_OK, EX_SOFTWARE, EX_USAGE, MEANINGS, exit_code_of

DEBUG_VARIABLE = "FASTQ_DEBUG_TRACEBACK"


class Failure(click.ClickException):
    """A command cannot go on; the text names the remedy."""

    def __init__(self, message: str, code: int = EX_FAILURE) -> None:
        super().__init__(message)
        self.code = code


class Misuse(click.UsageError):
    """A command line that cannot be carried out; said in one line with the remedy, without the usage text."""


def run_guarded(command: Callable[[], int | None]) -> int:
    """Run the command and return the exit code; whatever it raises has been printed as one line."""
    try:
        return command() or EX_OK
    except click.exceptions.Exit as error:
        return error.exit_code
    except Failure as error:
        return _report(error, error.message, error.code)
    except Misuse as error:
        return _report(error, error.message, EX_USAGE)
    except click.ClickException as error:
        if isinstance(error, click.BadParameter):
            _name_variable(error)
        # Click knows how to show a wrong usage: the usage line first.
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("Aborted!", err=True)
        return EX_FAILURE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `fastq status | head -1` does; that is no fault of the command.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EX_OK
    except FastqError as error:
        return _report(error, str(error) or type(error).__name__, exit_code_of(error))
    except OSError as error:
        return _report(error, describe(error), EX_FAILURE)
    except Exception as error:
        # Not foreseen: this one is ours, so its traceback is always shown.
        traceback.print_exc()
        return _report(error, f"internal error, please report it: {describe(error)}", EX_SOFTWARE, shown=True)


def _name_variable(error: click.BadParameter) -> None:
    """Have an error name the variable of the environment that its value came from."""
    ctx, param = error.ctx, error.param
    if ctx is None or param is None or error.param_hint is not None:
        return
    if ctx.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT:
        names = [param.envvar] if isinstance(param.envvar, str) else param.envvar or ()
        error.param_hint = next((name for name in names if os.environ.get(name)), None)


def _report(error: BaseException, text: str, code: int, shown: bool = False) -> int:
    if wants_traceback() and not shown:
        traceback.print_exception(error)
    click.echo(f"Error: {one_line(text)} [exit {code}: {MEANINGS[code]}]", err=True)
    return code


def wants_traceback() -> bool:
    """Return whether tracebacks are asked for, by --debug or the environment."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def one_line(text: str) -> str:
    """Return the text on one line."""
    return printable(" ".join(text.split()))


def describe(error: BaseException) -> str:
    """Return the error's class and text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
