"""``fastq result``: print what is stored of a task."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from fastq.cli import Globals
from fastq.cli.errors import Failure, Misuse
from fastq.cli.loader import is_celery
from fastq.cli.options import misplaced_globals
from fastq.errors import FastqError
from fastq.printable import printable_lines
from fastq.results import SQLITE, find_store
from fastq.states import READY_STATES, SUCCESS
from fastq.worker.process.exitcodes import EX_FAILURE, EX_OK, EX_TEMPFAIL

if TYPE_CHECKING:
    from fastq.interfaces import Meta

_OWN_RESULTS: Final = (
    "with rpc:// only the process that sent a task gets its result; use a store such as sqlite:///... or redis://..."
)


@click.command("result")
@click.argument("task_id")
@click.option("--traceback", is_flag=True, help="Print the traceback instead.")
@click.option("--wait", type=float, metavar="SECONDS", help="Wait so long for it to be ready.")
@click.option("-t", "--task", default="", help="Name of the task, where it has a result store of its own.")
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /, task_id: str, traceback: bool, wait: float | None, task: str) -> int:
    """Print the result of the task TASK_ID. Exit code 1: it failed; 75: it is not ready."""
    app = settings.load_any_app()
    meta = _of_celery(app, task_id, wait, task) if is_celery(app) else _of_fastq(app, task_id, wait)
    if meta is None or meta["status"] not in READY_STATES:
        state = meta["status"] if meta else "PENDING"
        raise Failure(f"task {task_id} is not ready ({state}); give it time with --wait <seconds>", EX_TEMPFAIL)
    return show(meta, traceback)


def _of_fastq(app: Any, task_id: str, wait: float | None) -> Meta | None:
    if app.stores_results and find_store(str(app.conf.result_backend)).replies:
        raise Misuse(_OWN_RESULTS)
    _require_file(str(app.conf.result_backend))
    found: Meta | None = app.store.load(task_id) if wait is None else app.store.wait(task_id, wait)
    return found


def _require_file(url: str) -> None:
    """Raise Failure where there is no file to read; looking would make one, of no use to anybody."""
    if find_store(url) is SQLITE:
        from fastq.brokers.sqlite.database import parse_url

        path = parse_url(url).path
        if not os.path.exists(path):
            raise Failure(f"there are no results here: {path} does not exist. Go to the folder it is in by --workdir")


def _of_celery(app: Any, task_id: str, wait: float | None, task: str) -> Meta | None:
    from fastq.celery.cli import client
    from fastq.celery.conf.settings import backend_of, own_store

    store = own_store(backend_of(app))
    if store == "rpc":
        raise Misuse(_OWN_RESULTS)
    if store == "disabled" and not task:
        raise FastqError("the application stores no results. Give it a result_backend")
    return client.meta_of(app, task_id, task, wait)


def show(meta: Meta, with_traceback: bool) -> int:
    """Print a final result, or the traceback of a failure. Raises Failure for a task that has nothing to print."""
    if meta["status"] == SUCCESS:
        if not with_traceback:
            click.echo(_for_output(meta["result"]))
        return EX_OK
    if with_traceback and meta.get("traceback"):
        click.echo(_for_output(meta["traceback"]))
        return EX_FAILURE
    raise Failure(f"task {meta['task_id']} ended as {meta['status']}: {_reason(meta['result'])}")


def _for_output(value: object) -> object:
    """Return what a task returned or raised: as it is for a program that reads it, without commands for a terminal."""
    return printable_lines(str(value)) if sys.stdout.isatty() else value


def _reason(result: object) -> str:
    """Return a stored exception in one line; stores keep it as a dict of its class and arguments."""
    if not isinstance(result, dict):
        return repr(result)
    message = result.get("exc_message", ())
    arguments = message if isinstance(message, (list, tuple)) else [message]
    return f"{result.get('exc_type')}({', '.join(map(repr, arguments))})"
