"""A call's straight line: decode, run, report how it ended. Takes no calls itself, and has no process of its own.

The only broad ``except`` of fastq is in ``Runner.run``, around user code.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeAlias

from fastq.app import FastQ
from fastq.codecs import accepted
from fastq.codecs.json import encode as encode_json
from fastq.codecs.meta import encode_meta
from fastq.errors import Ignore, NotRegistered, Reject, RemoteProtocolError, Retry, SoftTimeLimitExceeded
from fastq.request import Request, pop_request, push_request
from fastq.running.birth import ChildOptions, MemoryLimit
from fastq.running.decode import MAX_DETAIL, Malformed, decode_call
from fastq.running.limit import SoftLimit
from fastq.running.messages import TaskLog, retry_reason
from fastq.states import FAILURE, REJECTED, RETRY, STARTED, SUCCESS
from fastq.steps.retry import on_exception
from fastq.task import ExceptionInfo, Task
from fastq.wire.call import Call
from fastq.wire.pipe import (
    OUTCOME_FAILURE,
    OUTCOME_IGNORED,
    OUTCOME_MALFORMED,
    OUTCOME_REJECTED,
    OUTCOME_REQUEUE,
    OUTCOME_RETRY,
    OUTCOME_SUCCESS,
    OUTCOME_UNKNOWN,
    ChildPipe,
)

#: A handler that the task overrides, None for one that would do nothing.
Handler: TypeAlias = "Callable[..., None] | None"

logger = logging.getLogger("fastq.app.trace")

#: Modules whose frames a task's traceback does not begin with.
_OWN = ("fastq.running.runner", "fastq.running.limit")


class Plan:
    """What running one task takes, looked up once: its function and which of its handlers do anything."""

    __slots__ = (
        "after_return",
        "before_start",
        "function",
        "on_failure",
        "on_retry",
        "on_success",
        "task",
        "throws",
        "track_started",
    )

    def __init__(self, task: Task[..., Any], track_started: bool) -> None:
        self.task = task
        self.throws = task.throws
        # An overridden __call__ is the user's way to wrap the run; otherwise it would only cost a frame.
        self.function: Callable[..., Any] = task.run if type(task).__call__ is Task.__call__ else task
        self.track_started = track_started if task.track_started is None else task.track_started
        own = task.handlers
        self.before_start: Handler = task.before_start if "before_start" in own else None
        self.on_success: Handler = task.on_success if "on_success" in own else None
        self.on_failure: Handler = task.on_failure if "on_failure" in own else None
        self.on_retry: Handler = task.on_retry if "on_retry" in own else None
        self.after_return: Handler = task.after_return if "after_return" in own else None


class Runner:
    """Runs calls and reports their outcomes on the pipe.

    What it knows of a call is in the call's request, which is the running one of its thread or coroutine. One call at a
    time, in the main thread, is what ``SoftLimit`` and the pipe's records need.
    """

    def __init__(self, app: FastQ, options: ChildOptions) -> None:
        self._pipe: ChildPipe
        self._hostname = options.hostname
        self._memory = MemoryLimit(options.max_memory_kib, logging.getLogger("fastq.worker").warning)
        self._accept = accepted(app.conf.accept_content)
        self._extended = app.conf.result_extended
        self._plans = {name: Plan(task, options.track_started) for name, task in app.tasks.items()}
        self._log = TaskLog(logger)
        self._logs_info = logger.isEnabledFor(logging.INFO)
        self._limit = SoftLimit(lambda call: SoftTimeLimitExceeded())

    def begin(self, pipe: ChildPipe) -> None:
        """Get ready to run calls in this process and to report on that pipe."""
        self._pipe = pipe
        self._limit.begin()

    def run(self, call: Call) -> None:
        """Run one call and report how it ended. Raises nothing but what ends the process."""
        plan = self._plans.get(call.name)
        if plan is None:
            self._unknown(call)
            return
        try:
            args, kwargs, embed = decode_call(call, self._accept)
        except Malformed as error:
            self._pipe.finish(call, OUTCOME_MALFORMED, None, error.report)
            return
        request = Request.from_call(call, args, kwargs, self._hostname, embed)
        push_request(request)
        try:
            try:
                if plan.track_started:
                    self._pipe.state(
                        call.id,
                        STARTED,
                        encode_meta(call.id, STARTED, {"pid": os.getpid(), "hostname": self._hostname}),
                    )
                if plan.before_start is not None:
                    plan.before_start(call.id, args, kwargs)
                if call.soft_time_limit:
                    value = self._limit.run(call, plan.function, args, kwargs)
                else:
                    value = plan.function(*args, **kwargs)
                meta = None
                if call.wants_result:
                    if request.spawned is None and not self._extended:
                        meta = call.success_meta(encode_json(value))
                    if meta is None:
                        meta = self._meta(call, request, SUCCESS, value)
            except BaseException as error:
                self._raised(plan, call, request, error)
                return
            if plan.on_success is not None:
                self._handler(plan.on_success, value, call.id, args, kwargs)
            if plan.after_return is not None:
                self._handler(plan.after_return, SUCCESS, value, call.id, args, kwargs, None)
            report = None
            if self._logs_info or call.wants_report:
                text = _bounded_repr(value)
                report = _report(call, result=text)
                if self._logs_info:
                    try:
                        shown = request.argsrepr or "", request.kwargsrepr or ""
                    except RemoteProtocolError:  # headers that nobody has read until now, and that cannot be read
                        shown = "", ""
                    self._log.succeeded(call.name, call.id, self._runtime(call), text, *shown)
            self._pipe.finish(call, OUTCOME_SUCCESS, meta, report, self._memory.flag() if self._memory.limit_kib else 0)
        finally:
            pop_request()

    # --- outcomes other than success

    def _raised(self, plan: Plan, call: Call, request: Request, error: BaseException) -> None:
        if self._pipe.is_terminated:
            # Whatever the task has made of the SystemExit: the main process records that it was revoked.
            raise SystemExit(-signal.SIGTERM) from error
        if plan.task.autoretry is not None:
            try:
                error = on_exception(plan.task, error) or error
            except Exception as other:  # the next run could not be sent
                error = other
        if isinstance(error, Retry):
            self._retried(plan, call, request, error)
        elif isinstance(error, Ignore):
            self._log.ignored(call.name, call.id)
            self._pipe.finish(call, OUTCOME_IGNORED, None, None, self._memory.flag())
        elif isinstance(error, Reject):
            self._rejected(call, request, error)
        else:
            self._failed(plan, call, request, error)

    def _retried(self, plan: Plan, call: Call, request: Request, error: Retry) -> None:
        reason = error.exc if error.exc is not None else error
        text = _format(error)
        info = ExceptionInfo(reason)
        if plan.on_retry is not None:
            self._handler(plan.on_retry, reason, call.id, request.args, request.kwargs, info)
        if plan.after_return is not None:
            self._handler(plan.after_return, RETRY, reason, call.id, request.args, request.kwargs, info)
        delay = None if error.when is None else max(0.0, round(error.when - time.time(), 1))
        why = None if error.exc is None else _bounded_repr(error.exc)
        most = plan.task.max_retries
        self._log.retry(call.name, call.id, retry_reason(delay, why, call.retries + 1, most))
        meta = self._meta(call, request, RETRY, reason, text) if call.wants_result else None
        report = _report(call, exception=_bounded_repr(reason), traceback=text)
        self._pipe.finish(call, OUTCOME_RETRY, meta, report, self._memory.flag())

    def _rejected(self, call: Call, request: Request, error: Reject) -> None:
        self._log.rejected(call.name, call.id, str(error.reason))
        if error.requeue:
            self._pipe.finish(call, OUTCOME_REQUEUE, None, _report(call, requeue=True), self._memory.flag())
            return
        meta = self._meta(call, request, REJECTED, str(error.reason)) if call.wants_result else None
        # For the dead letters, then for monitors.
        text = "\n".join([" ".join(str(error.reason).split())[:MAX_DETAIL], _report(call, requeue=False) or ""])
        self._pipe.finish(call, OUTCOME_REJECTED, meta, text, self._memory.flag())

    def _failed(self, plan: Plan, call: Call, request: Request, error: BaseException) -> None:
        text = _format(error)
        info = ExceptionInfo(error)
        if plan.on_failure is not None:
            self._handler(plan.on_failure, error, call.id, request.args, request.kwargs, info)
        if plan.after_return is not None:
            self._handler(plan.after_return, FAILURE, error, call.id, request.args, request.kwargs, info)
        if isinstance(error, SoftTimeLimitExceeded):
            self._log.soft_limit(call.name, call.id, call.soft_time_limit)
        if plan.throws and isinstance(error, plan.throws):
            self._log.failed_expected(call.name, call.id, _bounded_repr(error))
        else:
            self._log.failed(call.name, call.id, _bounded_repr(error), text)
        meta = self._meta(call, request, FAILURE, error, text) if call.wants_result else None
        report = _report(call, exception=_bounded_repr(error), traceback=text)
        self._pipe.finish(call, OUTCOME_FAILURE, meta, report, self._memory.flag())

    def _unknown(self, call: Call) -> None:
        self._log.unregistered(call.name, call.id)
        meta = encode_meta(call.id, FAILURE, NotRegistered(call.name)) if call.wants_result else None
        self._pipe.finish(call, OUTCOME_UNKNOWN, meta)

    # --- parts

    def _handler(self, handler: Callable[..., Any], *args: Any) -> None:
        """Call one of the task's handlers; what it raises is logged, as the task's outcome stands already."""
        try:
            handler(*args)
        except Exception:
            logger.exception("task handler %r failed", getattr(handler, "__qualname__", handler))

    def _meta(self, call: Call, request: Request, state: str, value: Any, text: str | None = None) -> bytes:
        extended = None
        if self._extended:
            extended = {
                "name": call.name,
                "args": request.args,
                "kwargs": request.kwargs,
                "worker": self._hostname,
                "retries": call.retries,
                "queue": call.routing_key,
            }
        return encode_meta(
            call.id,
            state,
            value,
            traceback=text,
            children=[child.id for child in request.spawned] if request.spawned else (),
            extended=extended,
            parent_id=request.parent_id if self._extended else None,
        )

    def _runtime(self, call: Call) -> float:
        return time.monotonic() - call.started_s


def _report(call: Call, **fields: object) -> str | None:
    """Return what monitors are told of the outcome, if there are any."""
    return encode_json(fields).decode() if call.wants_report else None


def _bounded_repr(value: object) -> str:
    try:
        return repr(value)[:1024]
    except Exception as error:
        return f"<{type(value).__name__} whose repr raised {type(error).__name__}>"


def _format(error: BaseException) -> str:
    """Return the traceback as text, from the first frame that is not this line's own."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and tb.tb_frame.f_globals.get("__name__") in _OWN:
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb))
