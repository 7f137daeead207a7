"""The tasks of ``support.tasks_for_kinds`` in a FastQ application."""

from __future__ import annotations

from typing import Any

from fastq import FastQ, Ignore, Reject, SoftTimeLimitExceeded, Task, current_task, get_task_logger
from tests.support.tasks_for_kinds import AwaitedHandlers, Words, add_coroutines, add_handled, add_tasks, settings

app = FastQ("kinds", **settings())

words = Words(SoftTimeLimitExceeded, Ignore, Reject, lambda: current_task, get_task_logger(__name__))
add_tasks(app, words)
add_coroutines(app, words)


class Handled(AwaitedHandlers, Task[..., Any]):  # type: ignore[misc]  they are coroutine functions
    """A task with handlers."""


add_handled(app, Handled)
