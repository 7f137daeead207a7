"""Behaviours around the calls of tasks, one per file, and what a behaviour is: a ``Step``.

A step is asked once for each task what it does around a call. So the calls of a task that it has nothing to do with
cost nothing, and one more step is one more file and one more entry in a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, SUCCESS

if TYPE_CHECKING:
    from fastq.request import ExceptionInfo

#: A ``fastq.Task``, which stands above this.
AnyTask: TypeAlias = Any
#: Called with what ``before_start`` gets: id, arguments, keyword arguments.
Before: TypeAlias = Callable[[str, Sequence[Any], Mapping[str, Any]], object]
#: Called with what ended a call; returns what ends it instead, None to leave it.
OnException: TypeAlias = Callable[[BaseException], "BaseException | None"]
#: Called with what ``after_return`` gets: state, value or exception, id, arguments, keyword arguments, traceback.
After: TypeAlias = Callable[[str, Any, str, Sequence[Any], Mapping[str, Any], "ExceptionInfo | None"], object]

#: The states in which a run ends.
ENDS: Final = (SUCCESS, FAILURE, RETRY, IGNORED, REJECTED)

F = TypeVar("F")


class Step:
    """What happens around the calls of tasks. A step of its own overrides what it needs: ``FastQ(steps=[MyStep()])``.

    Each method is asked once for each task, before its first call, and returns the function for the calls; None:
    nothing to do. The functions are called in the process that runs the task, while ``task.request`` is the call.
    """

    def before(self, task: AnyTask) -> Before | None:
        """Return what is called before the task's function. What that raises ends the call, as if the task had."""
        return None

    def on_exception(self, task: AnyTask) -> OnException | None:
        """Return what is called with the exception that ends a call, and may return another one: a Retry for one."""
        return None

    def after(self, task: AnyTask, state: str) -> After | None:
        """Return what is called when a call ends in this state, one of ``ENDS``, before anybody hears of it.

        What that raises is logged and changes nothing.
        """
        return None


class Around:
    """What surrounds the calls of one task: the first step is the outermost."""

    __slots__ = ("after", "before", "on_exception")

    def __init__(self, task: AnyTask, steps: Sequence[Step]) -> None:
        inner_first = steps[::-1]
        self.before = _given((step, step.before(task)) for step in steps)
        self.on_exception = _given((step, step.on_exception(task)) for step in inner_first)
        self.after = {state: _given((step, step.after(task, state)) for step in inner_first) for state in ENDS}

    def end_of(self, error: BaseException) -> BaseException:
        """Return what ends a call that has raised this: what the steps make of it, or what one of them raises."""
        for on_exception in self.on_exception:
            try:
                other = on_exception(error)
            except Exception as raised:
                other = raised
            error = error if other is None else other
        return error


def _given(answers: Iterable[tuple[Step, F | None]]) -> tuple[F, ...]:
    """Return the functions that steps have given. Raises TypeError for what is none."""
    given: list[F] = []
    for step, function in answers:
        if function is None:
            continue
        if not callable(function):
            raise TypeError(f"step {type(step).__qualname__} has given {function!r:.80}; expected a function or None")
        given.append(function)
    return tuple(given)


def checked(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps. Raises TypeError for what is none, a class for one."""
    for step in steps:
        if not isinstance(step, Step):
            raise TypeError(f"steps holds {step!r:.80}; expected instances of classes that derive from fastq.Step")
    return tuple(steps)
