"""The tasks of ``support.tasks_for_kinds`` in a Celery application."""

from __future__ import annotations

import os

import celery
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

from tests.support.tasks_for_kinds import Words, add_coroutines, add_tasks, settings

app = celery.Celery(
    "kinds", broker=os.environ.get("FASTQ_BROKER_URL"), backend=os.environ.get("FASTQ_RESULT_BACKEND", "rpc://")
)
app.conf.update(settings())

words = Words(SoftTimeLimitExceeded, Ignore, Reject, lambda: celery.current_task, get_task_logger(__name__))
add_tasks(app, words)
add_coroutines(app, words)
