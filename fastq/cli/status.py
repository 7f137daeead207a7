"""``fastq status``: ask which workers are up. On RabbitMQ and Redis Celery's workers answer as well.

RabbitMQ, Redis: a ping is broadcast, the replies of a while are collected. Embedded broker: workers are listed in its
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from fastq.cli import Globals
from fastq.cli.errors import Misuse
from fastq.cli.options import misplaced_globals
from fastq.cli.remote import Printer, ask, broker_settings, nobody, remote_options

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
    for node, reply in online(broker_settings(settings), timeout, destination):
        replies[node] = reply
        if not as_json:
            printer.show(node, reply, with_body=False)
    if not replies:
        raise nobody(broker_settings(settings))
    if as_json:
        click.echo(json.dumps(replies))
    else:
        printer.count(len(replies))
    return 0


def online(settings: Settings, timeout_s: float, destination: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield each node that is up with its reply, as they come in."""
    url = str(settings.broker_url)
    if url.startswith("memory:"):
        raise Misuse(
            "a memory:// broker lives inside one process and cannot be asked; use sqlite://, amqp:// or redis://"
        )
    if not url.startswith("sqlite:"):
        yield from ask(settings, "ping", {}, timeout_s, destination)
        return
    from fastq.transport.sqlite import live_workers

    names = [worker.name for worker in live_workers(url)]
    yield from ((name, {"ok": "pong"}) for name in names if not destination or name in destination)
