"""Coroutine functions as tasks of a Celery application, which Celery itself cannot run.

Celery's stacks of running tasks go by thread. Where several calls share one, they go by call instead.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from threading import get_ident
from typing import Any, Final

import celery
from celery import _state

#: What a task may do around its calls.
_HANDLERS: Final = ("before_start", "on_success", "on_failure", "on_retry", "after_return")
#: What Celery's stacks go by: the call that runs in this context.
_ident: ContextVar[object] = ContextVar("fastq_celery_ident", default=None)
#: What the function of a task with ``autoretry_for`` has raised, for Celery's code that sees to it.
_raised: ContextVar[BaseException | None] = ContextVar("fastq_celery_raised", default=None)


def is_async(task: Any) -> bool:
    """Return whether the task is a coroutine function."""
    return inspect.iscoroutinefunction(own_function(task))


def own_function(task: Any) -> Any:
    """Return the task's function without what Celery has put around it for ``autoretry_for``."""
    return getattr(task, "_orig_run", None) or task.run


def set_own_function(task: Any, function: Any) -> None:
    """Put another function in its place, which it is to be known by as its ``fastq_original``."""
    if getattr(task, "_orig_run", None) is None:
        task.run = function
        return

    def run(*args: Any, **kwargs: Any) -> Any:
        error = _raised.get()
        if error is not None:
            raise error
        return function(*args, **kwargs)

    run.fastq_original = function.fastq_original  # type: ignore[attr-defined]
    task._orig_run = run


def finish_handlers(task: Any, finishing: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Have handlers that are coroutine functions run to their end: Celery's code calls them and drops the coroutine.

    ``finishing`` returns what does so, in place of a handler. Returns whether there is any.
    """
    found = False
    for name in _HANDLERS:
        handler = own_handler(getattr(task, name))
        if not inspect.iscoroutinefunction(handler):
            continue
        found = True
        finished = finishing(handler)
        setattr(task, name, handler if finished is handler else _finished(handler, finished))
    return found


def _finished(handler: Callable[..., Any], finished: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        # A coroutine of the application's that calls it awaits it, too.
        awaits = sys._getframe(1).f_code.co_flags & inspect.CO_COROUTINE
        return (handler if awaits else finished)(*args, **kwargs)

    run.fastq_original = handler  # type: ignore[attr-defined]
    return run


def own_handler(handler: Any) -> Any:
    """Return the handler that ``finish_handlers`` has replaced by this one, or the same."""
    return getattr(handler, "__dict__", {}).get("fastq_original", handler)  # a mock has every attribute


def restore(task: Any) -> None:
    """Put back what ``set_own_function`` and ``finish_handlers`` have replaced."""
    for name in ("run", "_orig_run", *_HANDLERS):
        found = vars(task).get(name)
        original = own_handler(found)
        if original is not found:
            delattr(task, name)
            if getattr(task, name, None) != original:
                setattr(task, name, original)


def retried(task: Any, error: BaseException, args: Any, kwargs: Any) -> BaseException:
    """Return what Celery makes of an exception that the task's own function has raised: a Retry, where it retries."""
    if getattr(task, "_orig_run", None) is None:
        return error
    before = _raised.set(error)
    try:
        task.run(*args, **kwargs)
    except BaseException as other:
        return other
    finally:
        _raised.reset(before)
    return error


def enter(number: int) -> None:
    """Have what runs in this context stand on stacks of its own: those of the call of this number."""
    _ident.set(("call", number))


def separate(app: celery.Celery) -> None:
    """Have Celery's stacks go by call from now on, in this process."""
    for stack in (_state._task_stack, *(task.request_stack for task in app.tasks.values())):
        local = getattr(stack, "_local", None)
        if local is not None:  # one of threads alone otherwise, which users ask for by a variable of their own
            object.__setattr__(local, "__ident_func__", _identify)


def _identify() -> object:
    return _ident.get() or get_ident()
