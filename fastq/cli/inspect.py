"""``fastq inspect``: ask workers, Celery's included, what they are and do. Changes nothing."""

from __future__ import annotations

import json

import click

from fastq.cli import Globals
from fastq.cli.options import misplaced_globals
from fastq.cli.remote import Printer, carry_out, chosen_command, list_option, remote_options


@click.command("inspect", context_settings={"allow_interspersed_args": True})
@click.argument("name", metavar="COMMAND")
@click.argument("words", nargs=-1, metavar="[ARGUMENTS]")
@list_option("inspect")
@remote_options
@misplaced_globals
@click.pass_obj
def command(
    settings: Globals,
    /,
    name: str,
    words: tuple[str, ...],
    timeout: float,
    destination: tuple[str, ...],
    as_json: bool,
) -> int:
    """Ask the workers with an inspect COMMAND; --list names them. Exit code 69: nobody replied."""
    chosen = chosen_command("inspect", name)
    replies = dict(carry_out(settings, chosen, words, timeout, destination, shows=not as_json))
    if as_json:
        click.echo(json.dumps(replies, default=str))
    else:
        Printer(settings).count(len(replies))
    return 0
