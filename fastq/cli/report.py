"""``fastq report``: what a bug report should say of this installation and application, without passwords."""

from __future__ import annotations

from typing import Any

import click

from fastq.cli import Globals
from fastq.cli.loader import is_celery, load_tasks
from fastq.cli.options import misplaced_globals


@click.command("report")
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /) -> int:
    """Print versions, platform and settings for a bug report."""
    from fastq.worker.report import report_text

    app: Any = settings.load_any_app()
    if is_celery(app):
        load_tasks(app.loader.import_default_modules, app)
        from fastq.celery.worker.program import bug_report

        click.echo(bug_report(app))
        return 0
    app.finalize()
    click.echo(report_text(app.conf))
    return 0
