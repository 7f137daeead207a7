"""Runs several calls at a time in greenlets, of gevent or eventlet, in a process that was patched before all else.

A greenlet gives way where it waits in patched code; what an exception from outside is to end, it reaches there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import FrameType
from typing import Any, Final, Protocol

from fastq import awaiting
from fastq.running.calls import LOOK_S, CallRunner, LastCalls, end_process, running_call
from fastq.running.limit import plain
from fastq.wire.call import Call
from fastq.wire.pipe import ChildPipe

#: How often the process says that its greenlets take turns, while calls run.
_TURN_S: Final = 0.25


class Library(Protocol):
    """What gevent and eventlet have in common, by one name."""

    def spawn(self, function: Callable[..., Any], *args: Any) -> Any:
        """Start a greenlet."""

    def current(self) -> Any:
        """Return the greenlet that runs."""

    def later(self, seconds: float, function: Callable[..., Any], *args: Any) -> Callable[[], None]:
        """Call a function after that time; return what cancels that."""

    def wait_read(self, fd: int) -> None:
        """Return when there is something to read."""

    def sleep(self, seconds: float) -> None:
        """Let others run."""

    def in_thread(self, function: Callable[[], Any]) -> Any:
        """Return what the function returns, called in a thread of the system's, while other greenlets run."""


class Gevent:
    """gevent."""

    def __init__(self) -> None:
        import gevent
        from gevent import socket

        self.spawn = gevent.spawn_raw
        self.current = gevent.getcurrent
        self.sleep = gevent.sleep
        self.wait_read = socket.wait_read
        self._hub = gevent.get_hub()
        self.in_thread = self._hub.threadpool.apply

    def later(self, seconds: float, function: Callable[..., Any], *args: Any) -> Callable[[], None]:
        """Call a function after that time."""
        timer = self._hub.loop.timer(max(0.0, seconds))
        timer.start(function, *args)

        def cancel() -> None:
            timer.stop()
            timer.close()

        return cancel


class Eventlet:
    """eventlet."""

    def __init__(self) -> None:
        import eventlet
        from eventlet import hubs, tpool
        from eventlet.greenthread import getcurrent

        self.spawn = eventlet.spawn_n
        self.current = getcurrent
        self.sleep = eventlet.sleep
        self._hubs = hubs
        self.in_thread = tpool.execute

    def wait_read(self, fd: int) -> None:
        """Return when there is something to read."""
        self._hubs.trampoline(fd, read=True)

    def later(self, seconds: float, function: Callable[..., Any], *args: Any) -> Callable[[], None]:
        """Call a function after that time."""
        cancel: Callable[[], None] = self._hubs.get_hub().schedule_call_global(seconds, function, *args).cancel
        return cancel


class _Running:
    """A call, and where it runs."""

    __slots__ = ("call", "greenlet", "is_cancelled", "is_inside", "is_struck", "wanted")

    def __init__(self, call: Call, greenlet: Any) -> None:
        self.call = call
        self.greenlet = greenlet
        self.is_inside = False  # in the function that an exception may be raised in
        self.is_struck = False
        self.is_cancelled = False
        self.wanted: BaseException | None = None  # what was to be raised before that


class GreenLimit:
    """The soft limit of calls in greenlets, and their end (the protocol is ``calls.Limit``)."""

    guards_all = True

    def __init__(
        self,
        error: Callable[[Call], Exception],
        is_spared: Callable[[FrameType | None], bool] | None = None,  # ``inside`` tells the task from what is around
        on_strike: Callable[[], None] = lambda: None,
    ) -> None:
        self.library: Library  # set in the process that runs the calls
        self.running: dict[int, _Running] = {}
        self._error = error
        self._on_strike = on_strike

    def begin(self) -> None:
        """Get ready in this process."""

    @property
    def cancelled(self) -> int:
        """How many calls run on that were cancelled."""
        return sum(each.is_cancelled for each in self.running.values())

    def run(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function under the call's limit, if it has one."""
        return self.around(call, self._guard, (call, function, args, kwargs), {})

    def around(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call what calls the task's own function under the call's limit, if it has one."""
        if not call.soft_time_limit:
            return function(*args, **kwargs)
        # In a greenlet of its own: what is called there may wait, which the hub must not.
        cancel = self.library.later(call.soft_time_limit, self.library.spawn, self._strike_late, call)
        try:
            return function(*args, **kwargs)
        finally:
            cancel()

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the task's own function as what can be ended; a coroutine function is run to its end."""
        function = plain(function)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = running_call.get()
            return function(*args, **kwargs) if call is None else self._guard(call, function, args, kwargs)

        return run

    def _guard(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        entry = self.running.get(call.seq)
        if entry is None or entry.is_inside or entry.greenlet is not self.library.current():
            return function(*args, **kwargs)
        if entry.wanted is not None:
            error, entry.wanted = entry.wanted, None
            entry.is_struck = True
            raise error
        entry.is_inside = True
        try:
            return function(*args, **kwargs)
        finally:
            entry.is_inside = False

    def _strike_late(self, call: Call) -> None:
        self._on_strike()
        self._strike(call.seq, self._error(call))

    def _strike(self, seq: int, error: BaseException) -> None:
        """Raise an exception in a call where it waits, at the hub's next turn."""
        self.library.later(0, self._throw, seq, error)

    def _throw(self, seq: int, error: BaseException) -> None:
        """Do it, in the hub: nothing comes between the look and the throw."""
        entry = self.running.get(seq)
        if entry is not None and entry.is_inside:
            entry.is_struck = True
            entry.greenlet.throw(error)
        elif entry is not None:
            entry.wanted = error

    def has_struck(self, call: Call) -> bool:
        """Return whether this call, which runs, was past its limit."""
        entry = self.running.get(call.seq)
        return entry is not None and entry.is_struck

    def is_cancelled(self, call: Call) -> bool:
        """Return whether this call, which runs, was told to end."""
        entry = self.running.get(call.seq)
        return entry is not None and entry.is_cancelled

    def cancel(self, seq: int) -> None:
        """Have a call end."""
        entry = self.running.get(seq)
        if entry is not None:
            entry.is_cancelled = True
            self._strike(seq, SystemExit())


def serve_gevent(pipe: ChildPipe, runner: CallRunner) -> None:
    """Run calls in greenlets of gevent until the pipe ends."""
    _Greenlets(pipe, runner, Gevent()).serve()


def serve_eventlet(pipe: ChildPipe, runner: CallRunner) -> None:
    """Run calls in greenlets of eventlet until the pipe ends."""
    _Greenlets(pipe, runner, Eventlet()).serve()


class _Greenlets:
    def __init__(self, pipe: ChildPipe, runner: CallRunner, library: Library) -> None:
        self._pipe = pipe
        self._runner = runner
        self._limit: GreenLimit = runner.limit
        self._library = self._limit.library = library
        self._turns = False
        self._flushes = False

    def serve(self) -> None:
        pipe, library = self._pipe, self._library
        # One thread has one running event loop, whichever greenlet runs it.
        awaiting.in_thread = library.in_thread
        pipe.owner = running_call.get
        pipe.on_cancel = lambda seq, signum: self._limit.cancel(seq)
        self._runner.begin(pipe)
        pipe.ready()
        while not pipe.stopped:
            library.wait_read(pipe.fileno())
            for call in pipe.take():
                library.spawn(self._run, call)
            if not self._turns:
                self._turn()
        last = LastCalls()
        library.sleep(LOOK_S)  # what was taken last begins
        while not pipe.closed and not last.are_over(len(self._limit.running), self._limit.cancelled):
            library.sleep(LOOK_S)
            pipe.take()  # calls that run may still be cancelled

    def _run(self, call: Call) -> None:
        running_call.set(call)
        self._limit.running[call.seq] = _Running(call, self._library.current())
        try:
            self._runner.run(call)
        except BaseException:
            end_process()
        del self._limit.running[call.seq]
        if not self._flushes:
            self._flushes = True
            self._library.later(0, self._flush)  # one bell for all that end in this turn

    def _flush(self) -> None:
        self._flushes = False
        self._pipe.flush()

    def _turn(self) -> None:
        """Say that the greenlets take turns, for as long as calls run."""
        self._pipe.turn()
        self._turns = bool(self._limit.running) or not self._turns
        if self._turns:
            self._library.later(_TURN_S, self._turn)
