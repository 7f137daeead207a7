"""The tasks of ``support.tasks_for_kinds`` in a FastQ application."""

from __future__ import annotations

import asyncio
from typing import Any

from fastq import FastQ, Ignore, Reject, SoftTimeLimitExceeded, Task, current_task, get_task_logger
from fastq.task import ExceptionInfo
from tests.support.tasks_for_kinds import Words, add_coroutines, add_tasks, settings

app = FastQ("kinds", **settings())

words = Words(SoftTimeLimitExceeded, Ignore, Reject, lambda: current_task, get_task_logger(__name__))
add_tasks(app, words)
add_coroutines(app, words)


class Handled(Task[..., Any]):
    """Its handlers are coroutine functions."""

    async def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:  # type: ignore[override]
        """Begin, after a wait."""
        await asyncio.sleep(0.01)
        seen[task_id] = ["before_start"]

    async def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:  # type: ignore[override]
        """End well, after a wait."""
        await asyncio.sleep(0.01)
        get_task_logger(__name__).warning("handlers: %s", [*seen.pop(task_id), "on_success", retval])

    async def on_failure(  # type: ignore[override]
        self, exc: Exception, task_id: str, args: Any, kwargs: Any, einfo: ExceptionInfo
    ) -> None:
        """End badly, after a wait."""
        await asyncio.sleep(0.01)
        get_task_logger(__name__).warning("handlers: %s", [*seen.pop(task_id), "on_failure", str(exc)])


seen: dict[str, list[str]] = {}


@app.task(name="handled", base=Handled)
async def handled(number: int, fails: bool) -> int:
    """Return the number or raise."""
    await asyncio.sleep(0.01)
    if fails:
        raise ValueError(f"number {number} is bad")
    return number
