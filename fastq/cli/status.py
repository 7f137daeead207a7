"""``fastq status``: ask which workers are up. On RabbitMQ and Redis Celery's workers answer as well.

RabbitMQ, Redis: a ping is broadcast, the replies of a while are collected. Embedded broker: workers are listed in its
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from fastq.brokers import MEMORY, SQLITE, find_broker
from fastq.cli import Globals
from fastq.cli.loader import load_tasks
from fastq.cli.options import misplaced_globals
from fastq.cli.remote import Printer, ask, nobody, remote_options
from fastq.cli.unread import unread_queues
from fastq.errors import SettingsError

if TYPE_CHECKING:
    from fastq.settings import Settings


@click.command("status")
@remote_options
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /, timeout: float, destination: tuple[str, ...], as_json: bool) -> int:
    """List the workers that are up. Exit code 69: there is none."""
    printer = Printer(settings)
    replies = {}
    app = settings.load_app()
    load_tasks(app.load_tasks, app)
    app.finalize()
    for node, reply in online(app.conf, timeout, destination):
        replies[node] = reply
        if not as_json:
            printer.show(node, reply, with_body=False)
    if not replies:
        raise nobody(app.conf, destination)
    if as_json:
        click.echo(json.dumps(replies))
    else:
        printer.count(len(replies))
    if app.tasks and not destination:
        read = {queue for _, queues in read_queues(app.conf, timeout, list(replies)) for queue in queues}
        for queue, text in unread_queues(app, read):
            click.echo(f"Queue {queue!r} is read by none of them: {text}", err=True)
    return 0


def read_queues(settings: Settings, timeout_s: float, nodes: Sequence[str] = ()) -> list[tuple[str, set[str]]]:
    """Return the nodes that are up, or those of these that are, each with the names of the queues that it reads."""
    url = str(settings.broker_url)
    if find_broker(url) is SQLITE:
        from fastq.brokers.sqlite.broker import live_workers

        live = live_workers(url)
        return [(worker.name, set(worker.queues)) for worker in live if not nodes or worker.name in nodes]
    replies = ask(settings, "active_queues", {}, timeout_s, nodes)
    return [(node, {str(queue["name"]) for queue in found}) for node, found in replies if isinstance(found, list)]


def online(settings: Settings, timeout_s: float, destination: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield each node that is up with its reply, as they come in."""
    url = str(settings.broker_url)
    if find_broker(url) is MEMORY:
        raise SettingsError(
            "a memory:// broker lives inside one process and cannot be asked; use sqlite://, amqp:// or redis://"
        )
    if find_broker(url) is not SQLITE:
        yield from ask(settings, "ping", {}, timeout_s, destination)
        return
    from fastq.brokers.sqlite.broker import live_workers

    names = [worker.name for worker in live_workers(url)]
    yield from ((name, {"ok": "pong"}) for name in names if not destination or name in destination)
