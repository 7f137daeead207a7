"""``task.apply_async`` for calls that have nothing but arguments, such as ``delay``'s: most of them.

It is put on the task itself at its first call. The class's own method stays the one that counts: it is called for all
other calls, and for every call once it is not Celery's any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import celery
import celery.app.task

from fastq.celery.sending.stock import is_own

#: What has to be Celery's for the short way, beside the method itself.
METHODS = ("apply_async", "shadow_name", "_get_exec_options", "AsyncResult")
#: Celery's releases whose ``apply_async`` is known.
KNOWN_RELEASES = ((5, 4), (5, 5), (5, 6), (5, 7))

#: Sends a task with arguments, an id and its own options; NotImplemented when the call has to go the long way.
Send = Callable[[Any, Any, Any, "str | None", "Defaults"], Any]


class Defaults:
    """What a task's calls have in common: its options as Celery reads them, split as the sender wants them."""

    __slots__ = ("call", "options", "shape", "source")

    def __init__(self, task: Any, route_options: tuple[str, ...]) -> None:
        self.source = task._get_exec_options()
        said = {"shadow": None, **self.source}
        said.setdefault("ignore_result", task.ignore_result)
        self.options = {name: said.pop(name) for name in route_options if name in said}
        self.call = said
        #: What the sender has made of them.
        self.shape: Any = None


def adopt(task: Any, send: Send, route_options: tuple[str, ...]) -> None:
    """Put the short way on a task, if the task is one of Celery's plain ones."""
    kind = type(task)
    methods_are_own = all(is_own(getattr(kind, name, None), celery.app.task, name) for name in METHODS)
    is_special = task.__v2_compat__ or getattr(task, "_dump_pydantic_arguments", None) is not None
    if methods_are_own and not is_special and celery.VERSION[:2] in KNOWN_RELEASES and "apply_async" not in vars(task):
        task.apply_async = short_way(task, send, route_options)


def short_way(task: Any, send: Send, route_options: tuple[str, ...]) -> Callable[..., Any]:
    """Return ``apply_async`` for one task."""
    kind = type(task)
    stock = kind.apply_async
    defaults = Defaults(task, route_options)

    def apply_async(args: Any = None, kwargs: Any = None, task_id: Any = None, *rest: Any, **options: Any) -> Any:
        is_short = not rest and not options and kind.apply_async is stock and task._exec_options is defaults.source
        if is_short and not (task.soft_time_limit and task.time_limit):
            if task.typing and (check := getattr(task, "__header__", None)) is not None:
                check(*(args or ()), **(kwargs or {}))
            result = send(task, args, kwargs, task_id, defaults)
            if result is not NotImplemented:
                return result
        return kind.apply_async(task, args, kwargs, task_id, *rest, **options)

    return apply_async
