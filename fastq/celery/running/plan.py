"""What is looked up of a Celery application's task before its first call: how its calls run, and what around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import celery
from celery.app.task import Task as BaseTask
from celery.app.trace import task_has_custom

from fastq.celery.checking.hookpoints import touched
from fastq.celery.running._request import faster
from fastq.celery.running.coroutines import finish_handlers, is_async
from fastq.running.limit import plain


class Plan:
    """What running one task takes, looked up once: how its calls run, and which of its handlers do anything.

    ``finishing`` makes a plain function of a handler that is a coroutine function.
    """

    def __init__(
        self,
        app: celery.Celery,
        task: Any,
        worker_saves: bool,
        finishing: Callable[[Callable[..., Any]], Callable[..., Any]] = plain,
    ) -> None:
        self.task = task
        self.reasons = touched(task, app)
        self.is_traced = bool(self.reasons)
        #: Where Celery would have the child store results, and the main process does not do it.
        self.stores_here = not worker_saves and not _is_disabled(task)
        # Celery's own __call__ only guards stacks that are in order here; one of the user's is the way to wrap the run.
        self.function: Callable[..., Any] = task.run if type(task).__call__ is BaseTask.__call__ else task
        self.requests = faster(task.request_stack)
        self.is_async = is_async(task)
        #: Whether anything of a call is a coroutine function.
        self.awaits = finish_handlers(task, finishing) or self.is_async
        self.track_started = bool(task.track_started)
        self.repr_limit: int = task.resultrepr_maxsize
        self.before_start = task.before_start if task_has_custom(task, "before_start") else None
        self.on_success = task.on_success if task_has_custom(task, "on_success") else None
        self.after_return = task.after_return if task_has_custom(task, "after_return") else None
        self.cleanup = _cleanups(task, app)
        self.has_handlers = self.on_success is not None or self.after_return is not None or bool(self.cleanup)


def ignores(task: Any, fields: dict[str, Any]) -> bool:
    """Return whether nobody wants the result of the call with this request."""
    ignored = fields.get("ignore_result")
    return bool(task.ignore_result if ignored is None else ignored)


def is_default_loader(app: celery.Celery, method: str) -> bool:
    """Return whether the application's loader has Celery's own method of that name."""
    return getattr(getattr(type(app.loader), method), "__module__", "") == "celery.loaders.base"


def _is_disabled(task: Any) -> bool:
    return type(task.backend).__name__ == "DisabledBackend"


def _cleanups(task: Any, app: celery.Celery) -> tuple[Callable[[], None], ...]:
    """Return what is to be called after each run: not what is known to do nothing."""
    found: list[Callable[[], None]] = []
    process_cleanup = getattr(type(task.backend), "process_cleanup", None)
    if getattr(process_cleanup, "__module__", "") != "celery.backends.base":
        found.append(task.backend.process_cleanup)
    if not is_default_loader(app, "on_process_cleanup"):
        found.append(app.loader.on_process_cleanup)
    return tuple(found)
