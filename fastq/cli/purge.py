"""``fastq purge``: delete the messages that wait in queues. Messages that a worker already holds are not touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from fastq.cli import Globals
from fastq.cli.loader import is_celery
from fastq.cli.options import misplaced_globals, name_list, plural


@click.command("purge")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option(
    "-Q",
    "--queues",
    type=name_list,
    default="",
    metavar="A,B",
    help="Queues to empty. Default: all of the app.",
)
@click.option("-X", "--exclude-queues", type=name_list, default="", metavar="A,B", help="Queues to leave alone.")
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /, force: bool, queues: tuple[str, ...], exclude_queues: tuple[str, ...]) -> int:
    """Delete every message that waits in the queues. There is no way back."""
    app = settings.load_any_app()
    chosen, counts = (_in_celery if is_celery(app) else _in_fastq)(app, queues, exclude_queues)
    if not force:
        confirm(chosen)
    count = sum(counts)
    click.echo(f"Purged {plural(count, 'message')} from {plural(len(chosen), 'known task queue')}.")
    return 0


def _in_fastq(app: Any, asked: Sequence[str], excluded: Sequence[str]) -> tuple[Sequence[str], Iterator[int]]:
    """Return the queues, and what empties one after the other and yields how many messages were in it."""
    from fastq.worker.options import chosen_queues

    chosen = chosen_queues(tuple(asked), tuple(excluded), app.conf)
    return chosen, (app.publisher.purge(name) for name in chosen)


def _in_celery(app: Any, asked: Sequence[str], excluded: Sequence[str]) -> tuple[Sequence[str], Iterator[int]]:
    from fastq.celery.cli import client

    chosen = client.known_queues(app, asked, excluded)
    return chosen, client.purge(app, chosen)


def confirm(queues: Sequence[str]) -> None:
    """Ask for a typed "yes". Raises Abort for any other answer."""
    click.echo(f"This deletes every task that waits in {', '.join(queues)}, for good. (-f: do not ask)", err=True)
    if click.prompt("Type yes to go on", default="no", show_default=False, err=True).strip().lower() != "yes":
        raise click.Abort
