"""``fastq call``: send one task by name. With an application, it must be one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import click

from fastq.brokers import SQLITE, find_broker, has_bus
from fastq.cli import Globals
from fastq.cli.errors import Misuse
from fastq.cli.loader import is_celery, load_tasks
from fastq.cli.options import json_array, json_object, misplaced_globals, moment, moment_or_seconds
from fastq.errors import FastqError, ResultTimeout
from fastq.net.urls import mask_url

if TYPE_CHECKING:
    from fastq.app import FastQ
    from fastq.interfaces import Meta
    from fastq.result import AsyncResult
    from fastq.sending.options import SendOptions
    from fastq.settings import Settings

_ASK_S: Final = 1.0  # chosen: as `status` waits for replies


@click.command("call")
@click.argument("name")
@click.option("-a", "--args", type=json_array, default="[]", metavar="JSON", help="Positional arguments: a JSON array.")
@click.option(
    "-k", "--kwargs", type=json_object, default="{}", metavar="JSON", help="Keyword arguments: a JSON object."
)
@click.option("--countdown", type=float, help="Seconds from now at which to run.")
@click.option("--eta", type=moment, metavar="WHEN", help="When to run.")
@click.option(
    "--expires", type=moment_or_seconds, metavar="WHEN", help="When, or after how many seconds, not to run it any more."
)
@click.option("--serializer", help="Serializer of the arguments.")
@click.option("--queue", help="Queue to send to.")
@click.option("--exchange", help="Exchange to publish to.")
@click.option("--routing-key", help="Routing key.")
@click.option("--wait", is_flag=False, flag_value="", metavar="[SECONDS]", help="Wait for the result and print it.")
@misplaced_globals
@click.pass_obj
def command(
    settings: Globals, /, name: str, args: list[Any], kwargs: dict[str, Any], wait: str | None, **routing: Any
) -> int:
    """Send the task NAME and print its id."""
    timeout_s = _seconds(wait)
    app = settings.load_any_app()
    given = {option: value for option, value in routing.items() if value is not None}
    try:
        if is_celery(app):
            from fastq.celery.cli import client

            result = client.send(app, name, args, kwargs, given)
        else:
            result = _send(app, name, args, kwargs, given, bool(settings.app or settings.application))
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error
    click.echo(result.id)
    if wait is None:
        return 0
    from fastq.cli.result import show

    try:
        meta = _awaited(app, result, timeout_s)
    except ResultTimeout as error:
        if why := _why_not_run(app, name, args, kwargs, given):
            raise ResultTimeout(f"{error}; {why}") from error
        raise
    return show(meta, with_traceback=False)


def _send(
    app: FastQ, name: str, args: list[Any], kwargs: dict[str, Any], options: dict[str, Any], is_known: bool
) -> AsyncResult[Any]:
    """Send the task and return its handle. An application that was named, and has tasks, must have this one."""
    if app.conf.task_always_eager:
        raise Misuse("task_always_eager is on in this application: its tasks run where they are called")
    load_tasks(app.load_tasks, app)
    task = app.tasks.get(name)
    if task is not None:
        try:
            task.check_arguments(args, kwargs)
        except TypeError as error:
            raise Misuse(f"task {name!r} cannot be called with these arguments: {error}") from error
        return task.apply_async(args, kwargs, **options)
    if is_known and app.tasks:
        raise Misuse(
            f"no task {name!r} in {app!r}; {_nearest(name, list(app.tasks))} "
            "For one that only another application has, name the broker alone: fastq -b <URL> call ..."
        )
    return app.send_task(name, args, kwargs, **options)


def _nearest(name: str, known: list[str]) -> str:
    import difflib  # only needed on the way to an error

    by_end = {each.rpartition(".")[2]: each for each in known}
    near = difflib.get_close_matches(name, known, 1) or [
        by_end[end] for end in difflib.get_close_matches(name.rpartition(".")[2], by_end, 1)
    ]
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known)[:10])}."


def _awaited(app: Any, result: Any, timeout_s: float | None) -> Meta:
    if is_celery(app):
        from fastq.celery.cli import client

        return client.wait_for(app, result, timeout_s)
    _warn_if_nobody_works(str(app.conf.broker_url))
    meta: Meta = app.store.wait(result.id, timeout_s)
    return meta


def _why_not_run(app: Any, name: str, args: list[Any], kwargs: dict[str, Any], options: dict[str, Any]) -> str:
    """Return why nobody may have run a call: no worker is up, or none reads its queue; "" when that is not known."""
    places = {option: value for option, value in options.items() if option in ("queue", "exchange", "routing_key")}
    try:
        if is_celery(app):
            from fastq.celery.cli import client
            from fastq.celery.conf.settings import settings_of_app

            settings, queue = settings_of_app(app), client.queue_of(app, name, args, kwargs, places)
        else:
            settings, queue = app.conf, _queue_of(app, name, args, kwargs, cast("SendOptions", places))
        return _unread(settings, queue)
    except FastqError:  # the time-out is what is to be told
        return ""


def _unread(settings: Settings, queue: str | None) -> str:
    from fastq.cli.remote import no_worker_at
    from fastq.cli.status import read_queues

    url = str(settings.broker_url)
    is_file = find_broker(url) is SQLITE
    if not is_file and not (has_bus(url) and settings.worker_enable_remote_control):
        return ""
    workers = read_queues(settings, _ASK_S)
    if not workers:
        where = no_worker_at(url) if is_file else f"no worker is up on {mask_url(url)}, or none that answers"
        return f"{where}. Start one there: fastq -A <module> worker"
    if queue is None or any(queue in read for _, read in workers):
        return ""
    up = ", ".join(sorted({node for node, _ in workers})[:10])
    return f"it went to queue {queue!r}, which none of those that are up reads ({up}). Start one with -Q {queue}"


def _queue_of(app: FastQ, name: str, args: list[Any], kwargs: dict[str, Any], places: SendOptions) -> str | None:
    """Return the queue that a call went to; None when it went to an exchange."""
    task, envelopes = app.tasks.get(name), app.sender.envelopes
    if task is not None:
        envelope = envelopes.of_task(task, args, kwargs)
    else:
        envelope = app.sender.new_envelope(name, args, kwargs, {})
    envelope = envelopes.with_options(envelope, places)
    return None if envelope.exchange else envelope.routing_key


def _warn_if_nobody_works(url: str) -> None:
    """Say on standard error that the wait will be long, where workers are known without asking them."""
    if find_broker(url) is not SQLITE:
        return
    from fastq.brokers.sqlite.broker import live_workers
    from fastq.cli.remote import no_worker_at

    if not live_workers(url):
        click.echo(f"Waiting, but {no_worker_at(url)}; the task runs once one is started", err=True)


def _seconds(wait: str | None) -> float | None:
    if not wait:
        return None
    try:
        return float(wait)
    except ValueError:
        raise click.BadParameter(f"{wait!r} is not a number of seconds", param_hint="--wait") from None
