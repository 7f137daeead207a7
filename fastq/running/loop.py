"""Runs several calls at a time on one event loop: coroutine functions as its tasks, each in a context of its own.

Plain functions run in threads beside it, so that they do not stop it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import wraps
from typing import Any, Final

import uvloop

from fastq.awaiting import Interruptible, run_here
from fastq.running.calls import LOOK_S, CallRunner, LastCalls, end_process, running_call
from fastq.running.threads import ThreadLimit, Workers
from fastq.wire.call import Call
from fastq.wire.pipe import OUTCOME_FAILURE, ChildPipe

#: How often the loop says that it turns, while calls run.
_TURN_S: Final = 0.25


class LoopLimit(ThreadLimit):
    """The soft limit of coroutines, beside that of the functions in threads."""

    def __init__(self, error: Callable[[Call], Exception], *others: Any) -> None:
        super().__init__(error, *others)
        self.loop: asyncio.AbstractEventLoop
        self.tasks: dict[int, asyncio.Task[Any]] = {}  # of the coroutines that run, by their calls' numbers
        self._bridged: dict[int, asyncio.Task[Any]] = {}  # those that a thread waits for
        #: Whether a call's function is a coroutine function; asked of those that a thread runs.
        self.has_coroutine: Callable[[Call], bool] = lambda call: False
        self.cancelled: set[int] = set()
        self._struck: set[int] = set()

    async def run_async(
        self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Await the coroutine function under the call's limit."""
        if not call.soft_time_limit:
            return await function(*args, **kwargs)
        limited = Interruptible(function(*args, **kwargs), lambda: self.is_cancelled(call))
        task = asyncio.current_task()
        assert task is not None
        left_s = call.started_s + call.soft_time_limit - _now_s()
        timer = asyncio.get_running_loop().call_later(
            max(0.0, left_s), lambda: limited.interrupt(task, self._error(call))
        )
        try:
            return await limited.run()
        finally:
            timer.cancel()
            if limited.is_interrupted:
                self._struck.add(call.seq)

    def around(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call what calls the task's own function, under the call's limit: a coroutine has its own."""
        if self.has_coroutine(call):
            return function(*args, **kwargs)
        return super().around(call, function, args, kwargs)

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the task's own function; a coroutine function runs on the loop, and a thread waits for it.

        Where the loop itself runs, in code of a task that awaits another one, it returns the coroutine.
        """
        if not inspect.iscoroutinefunction(function):
            return super().inside(function)

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = running_call.get()
            if asyncio._get_running_loop() is not None or call is None:
                return function(*args, **kwargs)
            try:
                return self._bridge(call, lambda: self.run_async(call, function, args, kwargs))
            finally:
                self._struck.discard(call.seq)

        return run

    def finishing(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Return what runs a handler that is a coroutine function to its end: on the loop, while a thread waits."""

        @wraps(handler)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = running_call.get()
            if asyncio._get_running_loop() is not None or call is None:
                return run_here(handler(*args, **kwargs))
            return self._bridge(call, lambda: handler(*args, **kwargs))

        return run

    def _bridge(self, call: Call, start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what the coroutine returns, which runs on the loop, to a thread."""
        bridged = self._run_bridged(call, start)
        value, error = asyncio.run_coroutine_threadsafe(bridged, self.loop).result()
        if self.is_cancelled(call):
            raise SystemExit
        if error is not None:
            raise error
        return value

    async def _run_bridged(
        self, call: Call, start: Callable[[], Coroutine[Any, Any, Any]]
    ) -> tuple[Any, BaseException | None]:
        """Return what the coroutine returns, and what it raises: as a value, for the thread that waits for it."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if self.is_cancelled(call):
                return None, None
            self._bridged[call.seq] = task
            return await start(), None
        except BaseException as error:
            return None, error
        finally:
            self._bridged.pop(call.seq, None)

    def has_struck(self, call: Call) -> bool:
        """Return whether this call, which runs, was past its limit."""
        return call.seq in self._struck or super().has_struck(call)

    def is_cancelled(self, call: Call) -> bool:
        """Return whether this call, which runs, was told to end."""
        return call.seq in self.cancelled or super().is_cancelled(call)

    def cancel(self, seq: int) -> None:
        """Have a call end."""
        if (bridged := self._bridged.get(seq)) is not None:
            bridged.cancel()
        if (task := self.tasks.get(seq)) is not None:
            self.cancelled.add(seq)
            task.cancel()
            return
        super().cancel(seq)

    def forget(self, call: Call) -> None:
        """A coroutine has ended."""
        self.tasks.pop(call.seq, None)
        self.cancelled.discard(call.seq)
        self._struck.discard(call.seq)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def serve(pipe: ChildPipe, runner: CallRunner) -> None:
    """Run calls on a loop until the pipe ends."""
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(_Loop(pipe, runner, loop).serve())


class _Loop:
    def __init__(self, pipe: ChildPipe, runner: CallRunner, loop: asyncio.AbstractEventLoop) -> None:
        self._pipe = pipe
        self._runner = runner
        self._loop = loop
        self._limit: LoopLimit = runner.limit
        self._workers = Workers(pipe, runner)
        self._stopped = asyncio.Event()
        self._turns: asyncio.TimerHandle | None = None
        self._flushes = False

    async def serve(self) -> None:
        pipe = self._pipe
        pipe.owner = running_call.get
        pipe.on_cancel = lambda seq, signum: self._limit.cancel(seq)
        self._limit.loop = self._loop
        self._runner.begin(pipe)
        async with self._runner.lifespan():
            self._loop.add_reader(pipe.fileno(), self._on_calls)
            pipe.ready()
            await self._stopped.wait()
            await self._until_idle()
            self._loop.remove_reader(pipe.fileno())
        pipe.flush()

    def _on_calls(self) -> None:
        pipe, tasks = self._pipe, self._limit.tasks
        if self._turns is None:
            self._turn()
        for call in pipe.take():
            if self._runner.is_async(call):
                tasks[call.seq] = self._loop.create_task(self._run(call))
            else:
                self._workers.start(call)
        if pipe.stopped:
            self._stopped.set()
            if pipe.closed:
                self._loop.remove_reader(pipe.fileno())

    async def _run(self, call: Call) -> None:
        running_call.set(call)
        try:
            if not await self._runner.run_async(call):
                self._limit.forget(call)
                self._workers.start(call)  # by Celery's tracer, which blocks
                return
        except asyncio.CancelledError:
            if self._limit.is_cancelled(call):
                self._pipe.cancelled(call)
            elif not self._pipe.has_answered(call):
                logging.getLogger("fastq.worker").critical("call %s ended without an outcome", call, exc_info=True)
                self._pipe.finish(call, OUTCOME_FAILURE)
        except BaseException:
            end_process()
        self._limit.forget(call)
        if not self._flushes:
            self._flushes = True
            self._loop.call_soon(self._flush)  # one bell for all that end in this turn

    def _flush(self) -> None:
        self._flushes = False
        self._pipe.flush()

    def _turn(self) -> None:
        """Say that the loop turns, for as long as calls run."""
        self._pipe.turn()
        has_calls = self._limit.tasks or len(self._limit.strikes) or self._turns is None
        self._turns = self._loop.call_later(_TURN_S, self._turn) if has_calls else None

    async def _until_idle(self) -> None:
        """Wait until all calls have ended, but those that were cancelled and do not."""
        self._workers.stop()
        last, limit = LastCalls(), self._limit
        while not self._pipe.closed:
            running = len(limit.tasks) + self._workers.running
            if last.are_over(running, len(limit.cancelled) + limit.strikes.cancelled):
                return
            await asyncio.sleep(LOOK_S)
