"""How a process runs calls: what takes them from the pipe and what sees to their limits, for each kind of pool."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, NoReturn, Protocol

from fastq.plugins import Target, load
from fastq.pool.zygote import EX_INTERNAL
from fastq.wire.call import Call
from fastq.wire.pipe import ChildPipe

#: The call for which code runs, where several run at a time: of this thread, greenlet or coroutine.
running_call: ContextVar[Call | None] = ContextVar("fastq_running_call", default=None)


#: How often it is looked at the end of a process whether calls run on, and for how long at those that were cancelled.
LOOK_S: Final = 0.01
CANCELLED_S: Final = 1.0


class LastCalls:
    """The end of a process of several calls: it waits for them, but not for ever for those that were cancelled."""

    def __init__(self) -> None:
        self._patience_s = CANCELLED_S

    def are_over(self, running: int, cancelled: int) -> bool:
        """Return whether it may end; to be asked every ``LOOK_S``."""
        if running > cancelled:
            return False
        self._patience_s -= LOOK_S
        return not running or self._patience_s < 0


def end_process() -> NoReturn:
    """End a process of several calls because of the internal error that is being handled."""
    logging.getLogger("fastq.worker").critical("a child ends because of an internal error", exc_info=sys.exc_info())
    os._exit(EX_INTERNAL)


async def awaited(function: Callable[..., Any], *args: Any) -> None:
    """Call one of a task's handlers, or await it."""
    value = function(*args)
    if inspect.isawaitable(value):
        await value


class Limit(Protocol):
    """The soft limit of calls, and the end of those that are cancelled. The hard limit is the main process's affair.

    It is made with (error, is_spared, on_strike): ``error`` makes what is raised in a call; ``is_spared`` says of the
    interrupted frame whether it is put off; ``on_strike`` is called before.
    """

    #: Whether it is to run calls without a soft limit too.
    guards_all: bool

    def begin(self) -> None:
        """Get ready in this process, which runs calls from now on."""

    def run(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function under the call's limit."""

    def around(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call what calls the task's own function, which ``inside`` has marked, under the call's limit."""

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the task's own function such that what ``around`` calls can call it, a coroutine function too."""

    def has_struck(self, call: Call) -> bool:
        """Return whether this call, which runs or was the last one, was past its limit."""

    def is_cancelled(self, call: Call) -> bool:
        """Return whether this call, which runs, was told to end: nobody asks for its outcome."""


class CallRunner(Protocol):
    """What runs calls."""

    limit: Any  # a Limit, of the process's own way

    def begin(self, pipe: ChildPipe) -> None:
        """Get ready to run calls in this process and to report on that pipe."""

    def run(self, call: Call) -> None:
        """Run one call and report how it ended. Raises nothing but what ends the process."""

    def is_async(self, call: Call) -> bool:
        """Return whether the call is one for ``run_async``, where a loop runs calls."""

    def run_async(self, call: Call) -> Coroutine[Any, Any, bool]:
        """Run a call of a coroutine function in the same way, on the loop that runs. False: ``run`` is to do it."""

    def lifespan(self) -> AbstractAsyncContextManager[None]:
        """Return what surrounds all calls of a loop."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a process runs calls: ``serve(pipe, runner)`` until the pipe ends, and what makes its ``Limit``."""

    serve: Target
    limit: Target


#: By ``fastq.pool.Group.calls``; what is not here is a pool that was written for Celery, as ``module:Class``.
WAYS: Final = {
    "one": Way("fastq.running.child:serve", "fastq.running.limit:SoftLimit"),
    "threads": Way("fastq.running.threads:serve", "fastq.running.threads:ThreadLimit"),
    "gevent": Way("fastq.running.green:serve_gevent", "fastq.running.green:GreenLimit"),
    "eventlet": Way("fastq.running.green:serve_eventlet", "fastq.running.green:GreenLimit"),
    "loop": Way("fastq.running.loop:serve", "fastq.running.loop:LoopLimit"),
}


def is_hosted(calls: str) -> bool:
    """Return whether calls run in a pool that was written for Celery."""
    return calls not in WAYS


def way_of(calls: str) -> Way:
    """Return how a process runs calls."""
    if is_hosted(calls):
        hosted = "fastq.celery.running.hosted"
        return Way(load(f"{hosted}:serve_in")(calls), f"{hosted}:HostedLimit")
    return WAYS[calls]


def make_limit(
    calls: str,
    error: Callable[[Call], Exception],
    is_spared: Callable[[FrameType | None], bool] | None = None,
    on_strike: Callable[[], None] = lambda: None,
) -> Any:
    """Return the limit of a process that runs calls that way."""
    return load(way_of(calls).limit)(error, is_spared, on_strike)
