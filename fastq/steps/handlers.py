"""The handlers that a task class defines: ``before_start``, the three of ``on_...`` and ``after_return``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fastq.states import FAILURE, RETRY, SUCCESS
from fastq.steps import After, Before, Step


class Handled(Protocol):
    """What these steps need of a task."""

    #: The handlers that do anything.
    handlers: frozenset[str]

    @property
    def before_start(self) -> Before:
        """What is called before a run."""

    @property
    def on_success(self) -> Callable[..., object]:
        """What is called with a value."""

    @property
    def on_failure(self) -> Callable[..., object]:
        """What is called with an exception."""

    @property
    def on_retry(self) -> Callable[..., object]:
        """What is called with the reason of a retry."""

    @property
    def after_return(self) -> After:
        """What is called with every end but those without a result."""


class OwnHandlers(Step):
    """Calls the handlers that belong to one end of a call, and the one before it."""

    def before(self, task: Handled) -> Before | None:
        """Return ``before_start``."""
        return task.before_start if "before_start" in task.handlers else None

    def after(self, task: Handled, state: str) -> After | None:
        """Return the handler of that state."""
        if state == SUCCESS and "on_success" in task.handlers:
            return _of_value(task.on_success)
        if state == FAILURE and "on_failure" in task.handlers:
            return _of_exception(task.on_failure)
        if state == RETRY and "on_retry" in task.handlers:
            return _of_exception(task.on_retry)
        return None


class AfterReturn(Step):
    """Calls the handler that comes last."""

    def after(self, task: Handled, state: str) -> After | None:
        """Return ``after_return``."""
        return task.after_return if state in (SUCCESS, FAILURE, RETRY) and "after_return" in task.handlers else None


def _of_value(handler: Callable[..., object]) -> After:
    def after(
        state: str, value: Any, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], einfo: object
    ) -> object:
        return handler(value, task_id, args, kwargs)  # of a coroutine function: whoever calls this awaits it

    after.__qualname__ = handler.__qualname__
    return after


def _of_exception(handler: Callable[..., object]) -> After:
    def after(
        state: str, value: Any, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any], einfo: object
    ) -> object:
        return handler(value, task_id, args, kwargs, einfo)

    after.__qualname__ = handler.__qualname__
    return after
