"""Tasks without an application at hand: ``@shared_task``, which every one gets, and the task that runs here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast, overload

from fastq.app import FastQ, apps, check_function, current_app, join_all, made_task
from fastq.request import current
from fastq.task import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastq.sending.options import TaskOptions

P = ParamSpec("P")
R = TypeVar("R")
Self_ = TypeVar("Self_", bound="Task[..., Any]")


class SharedTask:
    """What ``@shared_task`` leaves in a module: the task of the current application, looked up at each use."""

    def __init__(
        self, function: Callable[..., Any], bind: bool, base: type[Task[..., Any]] | None, options: TaskOptions
    ) -> None:
        # No application may be there yet: what is wrong is said here, not where one is made.
        check_function(function)
        made_task(base).declare(None, options.get("name") or function.__name__, function, options, bind)
        self._function = function
        self._declaration = (bind, base, options)
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__

    def join(self, app: FastQ) -> Task[..., Any]:
        """Make the task known to an application."""
        return app.add_task(self._function, *self._declaration)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function here and now, as a plain call."""
        return self._task()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task(), name)

    def __reduce__(self) -> str:
        return self.__qualname__

    def __repr__(self) -> str:
        return f"<shared task {self.__module__}.{self.__name__}>"

    def _task(self) -> Task[..., Any]:
        app = current_app()
        name = self._declaration[2].get("name") or app.name_of(self._function)
        return app.tasks[name]


@overload
def shared_task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def shared_task(
    *, bind: Literal[True], base: type[Task[..., Any]] | None = None, **options: Unpack[TaskOptions]
) -> Callable[[Callable[Concatenate[Self_, P], R]], Task[P, R]]: ...


@overload
def shared_task(
    *, bind: Literal[False] = False, base: type[Task[..., Any]] | None = None, **options: Unpack[TaskOptions]
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def shared_task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    bind: bool = False,
    base: type[Task[..., Any]] | None = None,
    **options: Any,
) -> Any:
    """Make a function a task of every application, those that are made later included. Options as for ``app.task``."""

    def share(function: Callable[..., Any]) -> SharedTask:
        shared = SharedTask(function, bind, base, cast("TaskOptions", options))
        join_all(shared.join)
        return shared

    return share if function is None else share(function)


class CurrentTask:
    """The task whose call is running here, as ``fastq.current_task``; false, and without attributes, outside any."""

    def __getattr__(self, name: str) -> Any:
        task = running()
        if task is None:
            raise AttributeError(f"no task is running here, so current_task has no {name!r}")
        return getattr(task, name)

    def __bool__(self) -> bool:
        return running() is not None

    def __eq__(self, other: object) -> bool:
        return other is self or other is running()

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's function here and now."""
        return self.__getattr__("__call__")(*args, **kwargs)

    def __reduce__(self) -> str:
        return "current_task"

    def __repr__(self) -> str:
        return f"<current_task {running()!r}>"


current_task = CurrentTask()


def running() -> Task[..., Any] | None:
    """Return the task whose call is running here, of the current application if that has it."""
    request = current()
    if request is None or request.task is None:
        return None
    return next((app.tasks[request.task] for app in apps() if request.task in app.tasks), None)
