"""``fastq purge``: delete the messages that wait in queues. Messages that a worker already holds are not touched."""

from __future__ import annotations

import click

from fastq.cli import Globals
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
    from fastq.worker.options import chosen_queues

    app = settings.load_app()
    chosen = chosen_queues(queues, exclude_queues, app.conf)
    if not force:
        confirm(chosen)
    count = sum(app.publisher.purge(name) for name in chosen)
    click.echo(f"Purged {plural(count, 'message')} from {plural(len(chosen), 'known task queue')}.")
    return 0


def confirm(queues: tuple[str, ...]) -> None:
    """Ask for a typed "yes". Raises Abort for any other answer."""
    click.echo(f"This deletes every task that waits in {', '.join(queues)}, for good. (-f: do not ask)", err=True)
    if click.prompt("Type yes to go on", default="no", show_default=False, err=True).strip().lower() != "yes":
        raise click.Abort
