"""Runs calls in a pool that somebody has written for Celery: an instance of it lives in the child and runs them.

Such a pool is a subclass of ``celery.concurrency.base.BasePool``. It may run a call at once, where it is handed over,
or later, in a thread or a loop of its own; it may have replaced Celery's tracer, and then awaits coroutine functions
by itself.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any, Final

from celery.app import trace

from fastq.celery.checking.hookpoints import is_genuine
from fastq.plugins import load
from fastq.running.calls import LOOK_S, CallRunner, LastCalls, end_process, running_call
from fastq.running.limit import plain
from fastq.running.threads import ThreadLimit
from fastq.wire.call import Call
from fastq.wire.pipe import ChildPipe

logger = logging.getLogger("celery.worker")

#: How long the pool's own ``stop`` is waited for once no call runs.
_STOP_S: Final = 5.0


class HostedLimit(ThreadLimit):
    """The soft limit of calls that run in threads of the pool's; what runs elsewhere is the pool's own affair."""

    def inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the task's own function as what can be ended; as it is where the pool's tracer is to see that."""
        return super().inside(function) if is_genuine(trace.build_tracer) else function

    def finishing(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        """Return a handler that is run to its end; as it is where the pool's tracer is to see to that."""
        return plain(handler) if is_genuine(trace.build_tracer) else handler

    def around(self, call: Call, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call what calls the task's own function; without a limit where ``inside`` has left that as it is."""
        if is_genuine(trace.build_tracer):
            return super().around(call, function, args, kwargs)
        return function(*args, **kwargs)


def serve_in(pool_class: str) -> Callable[[ChildPipe, CallRunner], None]:
    """Return what runs calls in an instance of that class (``module:Class``)."""
    return partial(serve, pool_class)


def serve(pool_class: str, pipe: ChildPipe, runner: CallRunner) -> None:
    """Run calls in an instance of the class until the pipe ends."""
    app = getattr(runner, "app", None)
    pool = load(pool_class)(limit=pipe.slots, app=app, putlocks=False, threads=True, forking_enable=False)
    # Only now: it may have put its own tracer in Celery's place.
    runner.begin(pipe)
    pool.start()
    hosted = _Hosted(pool, pipe, runner)
    pipe.owner = running_call.get
    pipe.on_cancel = hosted.cancel
    pipe.ready()
    while not pipe.stopped:
        # One by one: a pool may run it before it returns, and what waits for that has not started.
        for call in pipe.take(waits=True, most=1):
            hosted.start(call)
    hosted.stop()


class _Hosted:
    """The pool with the calls that it has."""

    def __init__(self, pool: Any, pipe: ChildPipe, runner: CallRunner) -> None:
        self._pool = pool
        self._pipe = pipe
        self._runner = runner
        self._strikes = runner.limit.strikes
        #: What the pool itself knows calls by, where it has said so.
        self._jobs: dict[int, Any] = {}
        #: Those that the pool has and has not begun.
        self._waiting: set[int] = set()

    def start(self, call: Call) -> None:
        """Hand a call to the pool, by Celery's words."""
        self._strikes.expect(call)
        self._waiting.add(call.seq)
        try:
            self._pool.apply_async(
                partial(self._run, call),
                args=(call.name, call.id),
                accept_callback=partial(self._accepted, call),
                callback=partial(self._ended, call),
                error_callback=partial(self._ended, call),
                timeout_callback=lambda *told: None,  # the main process says so itself
                soft_timeout=call.soft_time_limit or None,
                correlation_id=call.id,
            )
        except BaseException:
            end_process()  # nobody knows what has become of the call, nor what else the pool can do

    def _run(self, call: Call, *words: object) -> tuple[int, str, float]:
        """Be what the pool calls; it is told what Celery's own would have returned."""
        began = time.monotonic()
        copy_context().run(self._run_whole, call)  # what one call sets is not there for the next one
        self._pipe.flush()
        return 0, "", time.monotonic() - began

    def _run_whole(self, call: Call) -> None:
        self._waiting.discard(call.seq)
        running_call.set(call)
        self._strikes.run(call, self._run_or_end)

    def _run_or_end(self, call: Call) -> None:
        try:
            self._runner.run(call)
        except BaseException:
            if not self._strikes.is_cancelled(call):
                end_process()
            self._pipe.cancelled(call)

    def _accepted(self, call: Call, pid: Any, *when: object) -> None:
        if pid != os.getpid():
            self._jobs[call.seq] = pid

    def _ended(self, call: Call, *value: object) -> None:
        """Hear of the end."""
        self._jobs.pop(call.seq, None)
        if call.seq not in self._waiting:
            return
        # It has ended what it has not begun.
        self._waiting.discard(call.seq)
        if not self._strikes.is_cancelled(call):
            logger.critical("%s gives up a call that it has not begun: %r", type(self._pool).__name__, value)
            end_process()
        self._strikes.forget(call)
        self._pipe.cancelled(call)
        self._pipe.flush()

    def cancel(self, seq: int, signum: int) -> None:
        """Have a call end, by the pool where it can do that."""
        self._runner.limit.cancel(seq)
        job = self._jobs.get(seq)
        if job is not None:
            try:
                self._pool.terminate_job(job, signum)
            except Exception as error:
                logger.warning("%s cannot end a call: %r", type(self._pool).__name__, error)

    def stop(self) -> None:
        """Return when the calls have ended and the pool has stopped, or will not."""
        # In this order: Celery's own pools drop at their stop what they have not begun.
        self._call_pool("close")
        pipe, last, idle_s = self._pipe, LastCalls(), 0.0
        while not pipe.closed and not last.are_over(len(self._strikes), self._strikes.cancelled):
            time.sleep(LOOK_S)
            pipe.take()  # those that run may still be cancelled
            idle_s = idle_s + LOOK_S if len(self._strikes) == len(self._waiting) else 0.0
            if idle_s > _STOP_S:
                logger.error("%s has not begun its last %d calls", type(self._pool).__name__, len(self._waiting))
                break
        stopping = threading.Thread(target=self._call_pool, args=("stop",), name="fastq-stop", daemon=True)
        stopping.start()
        stopping.join(_STOP_S)

    def _call_pool(self, name: str) -> None:
        try:
            getattr(self._pool, name)()
        except Exception:
            logger.exception("%s has failed to %s", type(self._pool).__name__, name)
