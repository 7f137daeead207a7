"""Runs several calls at a time, each in a thread; the main thread takes them from the pipe, and sees to their limits.

An exception from outside reaches a thread before its next step of Python code: one that waits in C waits on. Such a
call is left behind by the main process, which replaces this one when its other calls have ended.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import wraps
from types import FrameType
from typing import Any, Final

from fastq.running.calls import LOOK_S, CallRunner, LastCalls, end_process, running_call
from fastq.running.limit import plain
from fastq.running.strikes import Strikes
from fastq.wire.call import Call
from fastq.wire.pipe import ChildPipe

#: How soon it is looked again whether a call imports something, in which it is not struck.
_AGAIN_S: Final = 0.01

#: So many ended calls may stand in the heap of limits before it is made anew.
_MOST_ENDED: Final = 64


class ThreadLimit:
    """The soft limit of calls in threads (the protocol is ``calls.Limit``); one more waits for the next that is due."""

    #: Every call is run by it, as every one may be ended from outside.
    guards_all = True

    def __init__(
        self,
        error: Callable[[Call], Exception],
        is_spared: Callable[[FrameType | None], bool] | None = None,
        on_strike: Callable[[], None] = lambda: None,
    ) -> None:
        self.strikes = Strikes()
        self._error = error
        self._on_strike = on_strike
        self._limited: dict[int, Call] = {}
        self._due: list[tuple[float, int]] = []  # a heap of times and numbers, those of ended calls too
        #: What is raised in calls that have begun to import something since that was told.
        self._told: dict[int, type[BaseException]] = {}
        self._changed: threading.Condition
        self._watches = False

    def begin(self) -> None:
        """Get ready in this process."""
        self._changed = threading.Condition()

    def run(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function under the call's limit, if it has one."""
        return self.around(call, self.strikes.guard, (call, function, args, kwargs), {})

    def around(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call what calls the task's own function under the call's limit, if it has one."""
        if not call.soft_time_limit:
            return function(*args, **kwargs)
        self._put(call.started_s + call.soft_time_limit, call)
        try:
            return function(*args, **kwargs)
        finally:
            self._limited.pop(call.seq, None)

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the task's own function as what can be ended; a coroutine function is run to its end."""
        function = plain(function)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = running_call.get()
            return function(*args, **kwargs) if call is None else self.strikes.guard(call, function, args, kwargs)

        return run

    def has_struck(self, call: Call) -> bool:
        """Return whether this call, which runs, was past its limit."""
        return self.strikes.is_struck(call)

    def is_cancelled(self, call: Call) -> bool:
        """Return whether this call, which runs, was told to end."""
        return self.strikes.is_cancelled(call)

    def cancel(self, seq: int) -> None:
        """Have a call end: nobody asks for its outcome."""
        call = self.strikes.cancel(seq)
        if call is not None and not self.strikes.strike(seq, SystemExit):
            self._put(time.monotonic() + _AGAIN_S, call)

    def _put(self, when: float, call: Call) -> None:
        with self._changed:
            self._limited[call.seq] = call
            heapq.heappush(self._due, (when, call.seq))
            if len(self._due) > 2 * len(self._limited) + _MOST_ENDED:
                self._due = [each for each in self._due if each[1] in self._limited]
                heapq.heapify(self._due)
            if not self._watches:
                self._watches = True
                threading.Thread(target=self._watch, name="fastq-limits", daemon=True).start()
            elif self._due[0][1] == call.seq:
                self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                call = self._limited.pop(heapq.heappop(self._due)[1], None)
            if call is not None and call in self.strikes:
                self._strike(call)

    def _strike(self, call: Call) -> None:
        """Raise what is to be raised in a call, soon if it imports something."""
        is_cancelled = self.strikes.is_cancelled(call)
        if not self.strikes.is_importing(call):
            error: type[BaseException] | None = SystemExit if is_cancelled else self._told.pop(call.seq, None)
            if error is None:
                self._on_strike()
                error = type(self._error(call))
            if self.strikes.strike(call.seq, error):
                return
            if not is_cancelled:
                self._told[call.seq] = error
        self._put(time.monotonic() + _AGAIN_S, call)


def serve(pipe: ChildPipe, runner: CallRunner) -> None:
    """Run calls in as many threads until the pipe ends."""
    workers = Workers(pipe, runner)
    pipe.owner = running_call.get
    pipe.on_cancel = lambda seq, signum: runner.limit.cancel(seq)
    runner.begin(pipe)
    pipe.ready()
    while not pipe.stopped:
        for call in pipe.take(waits=True):
            workers.start(call)
    workers.stop()
    last = LastCalls()
    while not pipe.closed and not last.are_over(workers.running, runner.limit.strikes.cancelled):
        time.sleep(LOOK_S)
        pipe.take()  # those that run may still be cancelled


class Workers:
    """Threads that run one call each, made when none is free."""

    def __init__(self, pipe: ChildPipe, runner: CallRunner) -> None:
        self._pipe = pipe
        self._runner = runner
        self._strikes: Strikes = runner.limit.strikes
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each thread that waits, and for no other
        self._threads: list[threading.Thread] = []

    @property
    def running(self) -> int:
        """Return how many threads have not ended; after ``stop`` those that run calls still."""
        return sum(thread.is_alive() for thread in self._threads)

    def start(self, call: Call) -> None:
        """Have a thread run a call, at once."""
        self._strikes.expect(call)
        try:
            self._free.get_nowait()
        except queue.Empty:
            thread = threading.Thread(target=self._work, name=f"fastq-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._calls.put(call)

    def stop(self) -> None:
        """Have the threads end after their calls."""
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        context, pipe = copy_context(), self._pipe
        while (call := self._calls.get()) is not None:
            try:
                context.copy().run(self._run, call)  # what one call sets is not there for the next one
            except BaseException:
                end_process()
            self._free.put(None)
            if self._calls.empty():
                pipe.flush()

    def _run(self, call: Call) -> None:
        running_call.set(call)
        self._strikes.run(call, self._runner.run)
