"""``fastq status``: ask which workers are up. On RabbitMQ Celery's workers answer as well.

RabbitMQ: a ping is broadcast and the replies of a while are collected. Embedded broker: workers are listed in its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from fastq.cli import Globals
from fastq.cli.errors import Failure, Misuse
from fastq.cli.options import misplaced_globals, name_list, plural
from fastq.worker.exitcodes import EX_OK, EX_UNAVAILABLE

if TYPE_CHECKING:
    from fastq.settings import Settings


@click.command("status")
@click.option("-t", "--timeout", type=float, default=1.0, show_default=True, help="Seconds to wait for replies.")
@click.option("-d", "--destination", type=name_list, default="", metavar="A,B", help="Ask these nodes only.")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /, timeout: float, destination: tuple[str, ...], as_json: bool) -> int:
    """List the workers that are up. Exit code 69: there is none."""
    app = settings.load_app()
    app.finalize()
    replies: dict[str, dict[str, Any]] = {}
    for node, reply in ask(app.conf, timeout, destination):
        replies[node] = reply
        if not as_json:
            click.echo(f"->  {node}: {'OK' if 'ok' in reply else 'ERROR'}")
    if not replies:
        raise Failure("No nodes replied within time constraint; start a worker, or wait longer with -t", EX_UNAVAILABLE)
    if as_json:
        click.echo(json.dumps(replies))
    elif not settings.quiet:
        click.echo(f"\n{plural(len(replies), 'node')} online.")
    return EX_OK


def ask(settings: Settings, timeout_s: float, destination: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each node that is up with its reply, as they come in."""
    url = str(settings.broker_url)
    if url.startswith("memory:"):
        raise Misuse("a memory:// broker lives inside one process and cannot be asked; use sqlite:// or amqp://")
    if url.startswith("sqlite:"):
        from fastq.transport.sqlite import live_workers

        names = [worker.name for worker in live_workers(url)]
        yield from ((name, {"ok": "pong"}) for name in names if not destination or name in destination)
        return
    from fastq.cli.broadcast import broadcast

    yield from broadcast(settings, "ping", timeout_s, destination)
