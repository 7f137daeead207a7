"""A call's straight line: decode, run, report how it ended. Takes no calls itself, and has no process of its own.

The only broad ``except`` of fastq is in ``Runner.run``, around user code.
"""

from __future__ import annotations

import logging
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, cast

from fastq.app import FastQ
from fastq.codecs import accepted
from fastq.codecs.json import encode as encode_json
from fastq.codecs.meta import encode_meta
from fastq.errors import CallEnded, Ignore, NotRegistered, Reject, RemoteProtocolError, Retry, SoftTimeLimitExceeded
from fastq.request import Request, pop_request, push_request
from fastq.running.birth import ChildOptions, MemoryLimit
from fastq.running.decode import MAX_DETAIL, Malformed, decode_call
from fastq.running.limit import SoftLimit
from fastq.running.messages import TaskLog, retry_reason
from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, SUCCESS
from fastq.steps import After, Around, Step
from fastq.steps.built_in import BUILT_IN
from fastq.steps.started import Started
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

logger = logging.getLogger("fastq.app.trace")

#: Modules whose frames a task's traceback does not begin with.
_OWN = ("fastq.running.runner", "fastq.running.limit", "fastq.steps")


class Plan:
    """What running one task takes, looked up once: its function, and what is called around it."""

    __slots__ = ("after_success", "around", "before", "function", "task", "throws")

    def __init__(self, task: Task[..., Any], steps: Sequence[Step]) -> None:
        self.task = task
        self.throws = task.throws
        # An overridden __call__ is the user's way to wrap the run; otherwise it would only cost a frame.
        self.function: Callable[..., Any] = task.run if type(task).__call__ is Task.__call__ else task
        self.around = Around(task, steps)
        self.before = self.around.before
        self.after_success = self.around.after[SUCCESS]


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
        self._started = Started(options.hostname, options.track_started)
        steps = (*app.steps, self._started, *BUILT_IN)
        self._plans = {name: Plan(task, steps) for name, task in app.tasks.items()}
        self._limit = SoftLimit(lambda call: SoftTimeLimitExceeded())
        self._log = TaskLog(logger)
        self._logs_info = logger.isEnabledFor(logging.INFO)

    def begin(self, pipe: ChildPipe) -> None:
        """Get ready to run calls in this process and to report on that pipe."""
        self._pipe = self._started.outlet = pipe
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
                if plan.before:  # an empty loop costs more than the question
                    for before in plan.before:
                        before(call.id, args, kwargs)
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
            if plan.after_success:
                for after in plan.after_success:
                    try:
                        after(SUCCESS, value, call.id, args, kwargs, None)
                    except Exception as error:
                        _log_failed(after, error)
            report = self._tell(call, request, value) if self._logs_info or call.wants_report else None
            self._pipe.finish(call, OUTCOME_SUCCESS, meta, report, self._memory.flag() if self._memory.limit_kib else 0)
        finally:
            pop_request()

    def _tell(self, call: Call, request: Request, value: Any) -> str | None:
        """Log a success, and return what monitors are told of it."""
        text = _bounded_repr(value)
        if self._logs_info:
            try:
                shown = request.argsrepr or "", request.kwargsrepr or ""
            except RemoteProtocolError:  # headers that nobody has read until now, and that cannot be read
                shown = "", ""
            self._log.succeeded(call.name, call.id, time.monotonic() - call.started_s, text, *shown)
        return _report(call, result=text) if call.wants_report else None

    # --- outcomes other than success

    def _raised(self, plan: Plan, call: Call, request: Request, error: BaseException) -> None:
        if isinstance(error, CallEnded):
            raise error
        if self._pipe.is_terminated:
            # Whatever the task has made of the SystemExit: the main process records that it was revoked.
            raise SystemExit(-signal.SIGTERM) from error
        error = plan.around.end_of(error)
        if isinstance(error, Retry):
            self._retried(plan, call, request, error)
        elif isinstance(error, Ignore):
            self._after(plan, IGNORED, error, request, None)
            self._log.ignored(call.name, call.id)
            self._pipe.finish(call, OUTCOME_IGNORED, None, None, self._memory.flag())
        elif isinstance(error, Reject):
            self._rejected(plan, call, request, error)
        else:
            self._failed(plan, call, request, error)

    def _retried(self, plan: Plan, call: Call, request: Request, error: Retry) -> None:
        reason = error.exc if error.exc is not None else error
        text = _format(error)
        info = ExceptionInfo(reason)
        self._after(plan, RETRY, reason, request, info)
        delay = None if error.when is None else max(0.0, round(error.when - time.time(), 1))
        why = None if error.exc is None else _bounded_repr(error.exc)
        most = plan.task.max_retries
        self._log.retry(call.name, call.id, retry_reason(delay, why, call.retries + 1, most))
        meta = self._meta(call, request, RETRY, reason, text) if call.wants_result else None
        report = _report(call, exception=_bounded_repr(reason), traceback=text)
        self._pipe.finish(call, OUTCOME_RETRY, meta, report, self._memory.flag())

    def _rejected(self, plan: Plan, call: Call, request: Request, error: Reject) -> None:
        self._after(plan, REJECTED, error, request, None)
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
        self._after(plan, FAILURE, error, request, info)
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

    def _after(
        self, plan: Plan, state: str, value: BaseException, request: Request, einfo: ExceptionInfo | None
    ) -> None:
        for after in plan.around.after[state]:
            try:
                after(state, value, cast("str", request.id), request.args, request.kwargs, einfo)
            except Exception as error:
                _log_failed(after, error)

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


def _log_failed(after: After, error: Exception) -> None:
    """Log what a function that is called behind a task raises: the task's outcome stands already."""
    logger.error("task handler %r failed", getattr(after, "__qualname__", after), exc_info=error)


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
