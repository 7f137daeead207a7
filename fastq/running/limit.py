"""The soft time limit of a process that runs one call at a time, by a signal (the protocol is ``calls.Limit``)."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Final

from fastq.pool.outside import absorb, raise_in, release_locks
from fastq.pool.process import LIMIT_SIGNAL, Timer
from fastq.wire.call import Call

#: How soon it is looked again whether a call runs on that its limit is to end.
_AGAIN_S: Final = 0.01


class SoftLimit:
    """Raises in the call that runs when its time is up: by a timer of its own, whose signal may come late.

    ``error`` makes what is raised in a call. While ``is_spared`` says so of the interrupted frame, it is put off.
    """

    guards_all = False

    def __init__(
        self,
        error: Callable[[Call], Exception],
        is_spared: Callable[[FrameType | None], bool] | None = None,
        on_strike: Callable[[], None] | None = None,  # none is needed: whoever watches handlers of signals sees it
    ) -> None:
        self._error = error
        self._is_spared = is_spared
        self._timer: Timer | _ThreadTimer
        self._limited: Call | None = None  # the call that runs under a limit
        self._struck: Call | None = None  # the last one that was past it

    def begin(self) -> None:
        """Get ready in this thread, which runs calls from now on: the main one, but in the process of a test."""
        if threading.current_thread() is not threading.main_thread():
            self._timer = _ThreadTimer(self._on_timer)
            return
        # Not signal.signal: it looks for an enum's member, which raises exceptions inside and so writes to many pages.
        module: Any = sys.modules["_signal"]
        module.signal(LIMIT_SIGNAL, self._on_signal)
        self._timer = Timer(LIMIT_SIGNAL)

    def run(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function under the call's limit."""
        self._limited = call
        self._timer.set(call.soft_time_limit)
        try:
            return function(*args, **kwargs)
        finally:
            self._limited = None
            self._timer.set(0)
            if self._struck is call:
                release_locks()

    #: The frames that are spared tell the task from what is around it.
    around = run

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function; a coroutine function is run to its end."""
        return plain(function)

    def has_struck(self, call: Call) -> bool:
        """Return whether this call, the last one, was past its limit."""
        return self._struck is call

    def is_cancelled(self, call: Call) -> bool:
        """Return False: a call that is to end has its process ended."""
        return False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        error = self._due(frame)
        if error is None:
            return
        awaiting: Any = sys.modules.get("fastq.awaiting")
        if awaiting is None or not awaiting.interrupt_here(error, frame):
            raise error

    def _on_timer(self, frame: FrameType | None) -> type[Exception] | None:
        error = self._due(frame)
        return None if error is None else type(error)

    def _due(self, frame: FrameType | None) -> Exception | None:
        """Return what is to be raised in the call that runs, which is at that frame."""
        call = self._limited
        # The time is looked at because a signal for the call before may be late.
        if call is None or time.monotonic() - call.started_s < call.soft_time_limit:
            return None
        if self._is_spared is not None and self._is_spared(frame):
            self._timer.set(_AGAIN_S)
            return None
        self._limited = None
        self._struck = call
        return self._error(call)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; for a coroutine function one that runs it to its end."""
    if not inspect.iscoroutinefunction(function):
        return function
    from fastq.awaiting import running_here  # an event loop, which few need here

    return running_here(function)


class _ThreadTimer:
    """A timer for the thread that makes it, which no signal reaches: ``ask`` says what to raise there, if anything.

    What it raises comes between two steps of the thread's code: one that waits hears of it when the wait is over.
    """

    def __init__(self, ask: Callable[[FrameType | None], type[Exception] | None]) -> None:
        self._ask = ask
        self._ident = threading.get_ident()
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._has_raised = False

    def set(self, seconds: float) -> None:
        """Ask in so many seconds; 0: not at all, and nothing is raised any more."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if seconds:
                self._timer = threading.Timer(seconds, self._strike)
                self._timer.daemon = True
                self._timer.start()
            elif self._has_raised:
                self._has_raised = False
                absorb()

    def _strike(self) -> None:
        with self._lock:
            if threading.current_thread() is self._timer:
                error = self._ask(sys._current_frames().get(self._ident))
                if error is not None:
                    self._has_raised = True
                    raise_in(self._ident, error)
