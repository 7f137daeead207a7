"""The tasks of ``support.tasks_for_kinds`` in a FastQ application."""

from __future__ import annotations

from fastq import FastQ, Ignore, Reject, SoftTimeLimitExceeded, current_task, get_task_logger
from tests.support.tasks_for_kinds import Words, add_tasks, settings

app = FastQ("kinds", **settings())

add_tasks(app, Words(SoftTimeLimitExceeded, Ignore, Reject, lambda: current_task, get_task_logger(__name__)))
