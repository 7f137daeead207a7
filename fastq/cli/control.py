"""``fastq control``: have workers, Celery's included, do something: revoke tasks, change their pool, shut down…"""

from __future__ import annotations

import json

import click

from fastq.cli import Globals
from fastq.cli.options import misplaced_globals
from fastq.cli.remote import carry_out, chosen_command, list_option, remote_options


@click.command("control")
@click.argument("name", metavar="COMMAND")
@click.argument("words", nargs=-1, metavar="[ARGUMENTS]")
@list_option("control")
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
    """Send the workers a control COMMAND; --list names them. Exit code 69: nobody replied."""
    chosen = chosen_command("control", name)
    replies = carry_out(settings, chosen, words, timeout, destination, shows=not as_json)
    if as_json:
        click.echo(json.dumps([{node: reply} for node, reply in replies], default=str))
    return 0
