"""``fastq check``: what a worker will make of an application, without starting one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fastq.brokers import unknown_options
from fastq.celery.checking.report import NOTE, RISK, Finding, Report, TaskPath
from fastq.cli import Globals
from fastq.cli.loader import is_celery, load_tasks
from fastq.cli.options import misplaced_globals
from fastq.cli.unread import declared_queues, unread_queues
from fastq.net.urls import mask_url
from fastq.worker.process.exitcodes import EX_FAILURE, EX_OK

if TYPE_CHECKING:
    from fastq.app import FastQ


@click.command("check")
@click.option("-j", "--json", "as_json", is_flag=True, help="Print JSON.")
@misplaced_globals
@click.pass_obj
def command(settings: Globals, /, as_json: bool) -> int:
    """Say which path each task takes, and which settings are unknown, not carried or risky.

    Exit code 1: something that the application sets will not happen. Risks and notes do not count.
    """
    settings.require_app()
    app: Any = settings.load_any_app(runs=True)
    report = report_on_celery(app) if is_celery(app) else report_on_fastq(app)
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else "\n".join(report.lines()))
    return EX_OK if report.is_ok else EX_FAILURE


def report_on_celery(app: Any) -> Report:
    """Return the report on a Celery application. Raises Failure when one of its modules does not import."""
    from fastq.celery.checking.check import check  # only Celery users have Celery

    load_tasks(app.loader.import_default_modules, app)
    return check(app)


def report_on_fastq(app: FastQ) -> Report:
    """Return the report on a FastQ application: unknown settings cannot exist there, and every task runs straight."""
    load_tasks(app.load_tasks, app)
    app.finalize()
    # Without task_queues, workers are told what to read by -Q.
    kind = NOTE if app.conf.task_queues is None else RISK
    return Report(
        application=f"{app.main or 'unnamed'} (FastQ)",
        broker=mask_url(str(app.conf.broker_url)),
        results=mask_url(str(app.conf.result_backend)),
        tasks=[TaskPath(name) for name in sorted(app.tasks)],
        findings=[
            *(Finding("unknown", name, text) for name, text in unknown_options(app.conf)),
            *(
                Finding(kind, f"queue {queue!r} is read by no worker without -Q", text)
                for queue, text in unread_queues(app, declared_queues(app.conf))
            ),
        ],
        carries_follow_ups=False,
    )
