"""Automatic retries: which exceptions run a task again, and after how long. Sends nothing: ``Task.send_retry`` does."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from fastq.errors import ControlFlow, Retry
from fastq.steps import OnException, Step

ExceptionClasses: TypeAlias = "type[BaseException] | Sequence[type[BaseException]]"

#: Stands for "as the task says", where None already means "for ever" or "no delay of its own".
UNSET: Final[Any] = object()

# 2^32 times any factor is past every cap; without the bound a task with many retries would count in huge integers.
_MAX_DOUBLINGS = 32


@dataclass(frozen=True)
class RetryPolicy:
    """When an exception runs a task again, and after how many seconds."""

    retry_for: tuple[type[BaseException], ...]
    never_for: tuple[type[BaseException], ...] = ()
    backoff: float = 0.0  # seconds before the first retry, doubled for each further one; 0: the task's own delay
    backoff_max: float = 600.0
    jitter: bool = True
    countdown: float | None = None
    max_retries: Any = UNSET

    def covers(self, error: BaseException) -> bool:
        """Whether this exception is one to retry for. Retry, Ignore and Reject never are."""
        return isinstance(error, self.retry_for) and not isinstance(error, (*self.never_for, ControlFlow))

    def delay_s(self, retries: int) -> float | None:
        """Return the seconds to wait after so many retries, None to leave it to the task.

        Jitter spreads over the whole span (full jitter), so that tasks which failed together do not come back together.
        """
        if not self.backoff:
            return self.countdown
        delay: float = min(self.backoff_max, self.backoff * 2 ** min(retries, _MAX_DOUBLINGS))
        return random.uniform(0, delay) if self.jitter else delay  # noqa: S311 - spreads load, guards nothing


class Retryable(Protocol):
    """What this step needs of a task."""

    autoretry: RetryPolicy | None
    max_retries: int | None

    @property
    def request(self) -> Any:
        """The running call."""

    def send_retry(self, error: BaseException, countdown: float | None) -> Retry:
        """Send the message of the next run."""


class Retrying(Step):
    """Has a call run again that ends with an exception which its task retries for."""

    def on_exception(self, task: Retryable) -> OnException | None:
        """Return what sends the next run, for tasks that are retried by themselves."""
        return None if task.autoretry is None else partial(on_exception, task)


def policy(
    retry_for: ExceptionClasses,
    never_for: ExceptionClasses = (),
    backoff: bool | float = False,
    backoff_max: float = 600.0,
    jitter: bool = True,
    options: Mapping[str, Any] | None = None,
) -> RetryPolicy | None:
    """Return the policy of a task's ``autoretry_for`` and ``retry_…`` options, None when it retries for nothing."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise TypeError(f"retry_kwargs is {options!r:.80}; expected a dict with max_retries, countdown or both")
    unknown = options.keys() - {"max_retries", "countdown"}
    if unknown:
        raise TypeError(f"retry_kwargs has the unknown key {min(unknown)!r}; known: max_retries, countdown")
    classes = exception_classes("autoretry_for", retry_for)
    if not classes:
        return None
    return RetryPolicy(
        classes,
        exception_classes("dont_autoretry_for", never_for),
        float(backoff),
        backoff_max,
        jitter,
        options.get("countdown"),
        options.get("max_retries", UNSET),
    )


def exception_classes(option: str, classes: Any) -> tuple[type[BaseException], ...]:
    """Return one class or several as a tuple. Raises TypeError, naming the option, for anything else."""
    if isinstance(classes, str) or not isinstance(classes, (type, Iterable)):
        raise TypeError(f"{option} is {classes!r:.80}; expected exception classes")
    found: tuple[Any, ...] = (classes,) if isinstance(classes, type) else tuple(classes)
    for cls in found:
        if not (isinstance(cls, type) and issubclass(cls, BaseException)):
            raise TypeError(f"{option} holds {cls!r}; expected exception classes")
    return found


def on_exception(task: Retryable, error: BaseException) -> Retry | None:
    """Have the next run sent if the task retries for this exception, and return its Retry; None: a failure.

    Call it while the request of the failed call is still the running one.
    """
    chosen = task.autoretry
    if chosen is None or not chosen.covers(error):
        return None
    retries: int = task.request.retries
    limit: int | None = task.max_retries if chosen.max_retries is UNSET else chosen.max_retries
    if limit is not None and retries >= limit:
        return None
    return task.send_retry(error, chosen.delay_s(retries))
