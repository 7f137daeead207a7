"""Queues that tasks go to and no worker reads: said where workers are started, checked and listed. FastQ only."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from fastq.queues import named_options

if TYPE_CHECKING:
    from fastq.app import FastQ
    from fastq.settings import Settings

_SHOWN = 5  # task names in one line


def declared_queues(settings: Settings) -> set[str]:
    """Return the queues that somebody is meant to read: all in ``task_queues``, or the default one."""
    return {name for name, _ in named_options(settings.task_queues)} or {settings.task_default_queue}


def unread_queues(app: FastQ, read: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each queue that a task goes to and that is not read, with the words for it."""
    for queue, tasks in sorted(app.tasks_by_queue().items()):
        if queue not in read:
            names = ", ".join(tasks[:_SHOWN]) + (f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else "")
            yield queue, f"calls of {names} go there and wait. Add it to task_queues, or start a worker with -Q {queue}"
