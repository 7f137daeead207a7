"""A task's run where it is called, with handlers and retries, as a worker would: ``apply`` and ``task_always_eager``.

Sends nothing and stores nothing; a retry follows at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from fastq.errors import Ignore, Reject, Retry
from fastq.request import ExceptionInfo, Request, pop_request, push_request
from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, SUCCESS
from fastq.steps import Around


class Runnable(Protocol):
    """What an eager run needs of a task."""

    name: str
    run: Callable[..., Any]
    is_async: bool


def finished(value: Any) -> Any:
    """Return a value, of a coroutine what it returns."""
    if not inspect.iscoroutine(value):
        return value
    from fastq.awaiting import run_here as await_here  # an event loop, which few need here

    return await_here(value)


def run_here(
    task: Runnable,
    around: Around,
    task_id: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    retries: int,
    headers: Mapping[str, Any],
) -> tuple[str, Any, ExceptionInfo | None]:
    """Run a call to its end and return its state, its value or exception, and the traceback."""
    while True:
        request = Request.local(
            task.name, args, kwargs, id=task_id, is_eager=True, retries=retries, sent_headers=headers
        )
        push_request(request)
        try:
            state, value, einfo = _execute(task, request, around)
            for after in around.after[state]:
                finished(after(state, value, task_id, request.args, request.kwargs, einfo))
        finally:
            pop_request()
        if state != RETRY:
            return state, value, einfo
        args, kwargs = request.next_run or (request.args, request.kwargs)
        retries += 1


def _execute(task: Runnable, request: Request, around: Around) -> tuple[str, Any, ExceptionInfo | None]:
    args, kwargs = request.args, request.kwargs
    try:
        for before in around.before:
            finished(before(cast("str", request.id), args, kwargs))
        value = task.run(*args, **kwargs)
        return SUCCESS, finished(value) if task.is_async else value, None
    except Exception as raised:
        error = around.end_of(raised)
    if isinstance(error, Retry):
        return RETRY, error.exc, ExceptionInfo(error.exc or error)
    if isinstance(error, Ignore):
        return IGNORED, None, None
    if isinstance(error, Reject):
        return REJECTED, None, None
    return FAILURE, error, ExceptionInfo(error)
