"""``fastq call``: send one task by name. The task need not be known here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastq.cli import Globals
from fastq.cli.errors import Misuse
from fastq.cli.loader import is_celery
from fastq.cli.options import json_array, json_object, misplaced_globals, moment, moment_or_seconds

if TYPE_CHECKING:
    from fastq.interfaces import Meta


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
            from fastq.celery import client  # only Celery users have Celery

            result = client.send(app, name, args, kwargs, given)
        else:
            result = app.send_task(name, args, kwargs, **given)
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error
    click.echo(result.id)
    if wait is None:
        return 0
    from fastq.cli.result import show

    return show(_awaited(app, result, timeout_s), with_traceback=False)


def _awaited(app: Any, result: Any, timeout_s: float | None) -> Meta:
    if is_celery(app):
        from fastq.celery import client

        return client.wait_for(app, result, timeout_s)
    _warn_if_nobody_works(str(app.conf.broker_url))
    meta: Meta = app.store.wait(result.id, timeout_s)
    return meta


def _warn_if_nobody_works(url: str) -> None:
    """Say on standard error that the wait will be long, where workers are known without asking them."""
    if not url.startswith("sqlite:"):
        return
    from fastq.cli.remote import no_worker_at
    from fastq.transport.sqlite import live_workers

    if not live_workers(url):
        click.echo(f"Waiting, but {no_worker_at(url)}; the task runs once one is started", err=True)


def _seconds(wait: str | None) -> float | None:
    if not wait:
        return None
    try:
        return float(wait)
    except ValueError:
        raise click.BadParameter(f"{wait!r} is not a number of seconds", param_hint="--wait") from None
