"""Celery's own commands, for a Celery application: what fastq has no command for, and what does not concern a worker.

They run in this process, by Celery's command line, with its exit codes. Nodes that ``multi`` starts are fastq's.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import celery
from celery.apps import multi as nodes
from celery.bin import multi
from celery.bin.celery import celery as group

from fastq.errors import FastqError

_MULTI = "multi"


class CommandFailed(FastqError):
    """One of Celery's own commands ended by an error of the application or of a library; its traceback was shown."""


class Node(nodes.Node):  # type: ignore[misc]  # Celery is not typed
    """A node of ``multi`` that is a worker of fastq's."""

    def _prepare_argv(self) -> tuple[str, ...]:
        first, *rest = super()._prepare_argv()
        return (first.replace("-m celery ", "-m fastq ", 1), *rest)


class Parser(nodes.MultiParser):  # type: ignore[misc]  # Celery is not typed
    """Makes nodes of that kind."""

    def _node_from_options(self, *arguments: Any) -> Node:
        # An attribute for the class of its nodes has only Celery 5.7; before, the name in its module is all there is.
        made = super()._node_from_options(*arguments)
        return Node(made.name, made.cmd, made.append, made.options, made.extra_args)


class Multi(multi.MultiTool):  # type: ignore[misc]  # Celery is not typed
    """``multi`` with fastq's workers."""

    MultiParser = Parser


def run(app: celery.Celery | None, name: str, arguments: Sequence[str], before: Sequence[str] = ()) -> int:
    """Run one of Celery's commands and return its exit code. ``before``: options that stand in front of it.

    Without an application it is Celery's default one.
    """
    if name == _MULTI:
        return run_multi([*arguments, *before])
    default, group.params[0].default = group.params[0].default, app
    try:
        group.main([*before, name, *arguments], prog_name="fastq", auto_envvar_prefix="CELERY")
    except SystemExit as error:
        return _code(error.code)
    except Exception as error:
        # Celery's command ran the application's code and that of libraries: none of it is ours.
        traceback.print_exc()
        raise CommandFailed(f"Celery's command {name!r} failed: {type(error).__name__}: {error}") from error
    finally:
        group.params[0].default = default
    return 0


def run_multi(arguments: Sequence[str]) -> int:
    """Start, stop or name nodes; every argument but the verb may also be an option of the workers."""
    tool = Multi(quiet="-q" in arguments, no_color="-C" in arguments)
    return _code(tool.execute_from_commandline([_MULTI, *arguments]))


def _code(value: Any) -> int:
    if value is None or isinstance(value, int):
        return int(value or 0)
    print(value, file=sys.stderr)
    return 1
