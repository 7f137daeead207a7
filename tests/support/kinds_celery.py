"""The tasks of ``support.tasks_for_kinds`` in a Celery application."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import celery
from celery import signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger
from celery.worker.request import Request

from tests.support.tasks_for_kinds import AwaitedHandlers, Words, add_coroutines, add_handled, add_tasks, settings

app = celery.Celery(
    "kinds", broker=os.environ.get("FASTQ_BROKER_URL"), backend=os.environ.get("FASTQ_RESULT_BACKEND", "rpc://")
)
app.conf.update(settings())

words = Words(SoftTimeLimitExceeded, Ignore, Reject, lambda: celery.current_task, get_task_logger(__name__))
add_tasks(app, words)
add_coroutines(app, words)


class Handled(AwaitedHandlers, celery.Task):
    """A task with handlers."""


class OwnRequest(Request):
    """Has the calls of its task go through Celery's tracer."""


add_handled(app, Handled)
add_handled(app, Handled, "_traced", Request=OwnRequest)


# Celery looks at an errback's own parameters: with all three, it is called as it stands, not sent.
@app.task(name="told_more")
def told_more(request: Any, error: Any, traceback: Any) -> None:
    """Write down whose failure it was called for."""
    words.logger.warning("told of %s: %s", request.id, error)


@app.task(name="told_more_async")
async def told_more_async(request: Any, error: Any, traceback: Any) -> None:
    """The same, in a coroutine function."""
    await asyncio.sleep(0)
    words.logger.warning("told of %s: %s", request.id, error)


def _listen(name: str) -> None:
    def receive(sender: Any, task_id: str = "", **_: Any) -> None:
        if sender.name.startswith("work"):
            running = celery.current_task.request.id if celery.current_task else None
            words.logger.warning("signal %s of %s while %s runs", name, task_id or sender.request.id, running)

    getattr(signals, name).connect(receive, weak=False)


for name in ("task_prerun", "task_success", "task_postrun"):
    _listen(name)
