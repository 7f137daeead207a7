"""The way of calls that nobody but the task itself has a hand in: the result goes to the main process.

Around the task are Celery's request, stacks, signals and handlers, each where somebody would notice. An exception is
recorded by Celery's own code.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import celery
from billiard.einfo import ExceptionInfo
from celery import _state, signals
from celery.app import trace
from celery.app.task import Context
from celery.app.trace import TraceInfo, task_has_custom
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.saferepr import saferepr

from fastq.celery.running._request import faster, to_context
from fastq.celery.running.ends import REQUEUED, Ends, encoded_by, exception_report
from fastq.celery.running.plan import Plan, ignores, is_default_loader
from fastq.codecs.json import encode as encode_json
from fastq.errors import EncodeError
from fastq.running.limit import SoftLimit
from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, STARTED, SUCCESS
from fastq.wire.call import Call

logger = logging.getLogger("celery.app.trace")


class Straight:
    """Runs calls past Celery's tracer. ``stores``: the main process stores results."""

    def __init__(self, app: celery.Celery, hostname: str, ends: Ends, limit: SoftLimit, stores: bool) -> None:
        self._hostname = hostname
        self._ends = ends
        self._limit = limit
        self._stores = stores
        self._extended = bool(app.conf.result_extended)
        self._running = faster(_state._task_stack)
        self._logs_info = False
        self._init_task = None if is_default_loader(app, "on_task_init") else app.loader.on_task_init

    def begin(self) -> None:
        """Look at what only the process knows that runs the calls."""
        self._logs_info = logger.isEnabledFor(logging.INFO)

    def run(self, plan: Plan, call: Call, args: Any, kwargs: Any, fields: dict[str, Any]) -> None:
        """Run a call and report how it ended."""
        task, task_id = plan.task, call.id
        request = to_context(fields)
        # Without a __call__ of its own the task is running already, for a call of itself by its own name.
        request._protected = int(plan.function is not task)
        self._running.push(task)
        plan.requests.push(request)
        state: str | None = None
        value, meta = None, None
        report: Any = None
        requeues = False
        try:
            if signals.task_prerun.receivers:
                signals.task_prerun.send(sender=task, task_id=task_id, task=task, args=args, kwargs=kwargs)
            if self._init_task is not None:
                self._init_task(task_id, task)
            if plan.track_started and not ignores(task, fields):
                started = {"pid": os.getpid(), "hostname": self._hostname}
                task.backend.store_result(task_id, started, STARTED, request=request)
            try:
                if plan.before_start is not None:
                    plan.before_start(task_id, args, kwargs)
                if call.soft_time_limit:
                    value = self._limit.run(call, plan.function, args, kwargs)
                else:
                    value = plan.function(*args, **kwargs)
                if call.wants_result:
                    meta = self._success_meta(call, request, task, value)
                state = SUCCESS
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                state, value, report = self._raised(task, request, error)
                traceback = report["traceback"] if state == FAILURE else None
                meta = self._ends.unaddressed_meta(call, task, fields, state, value, traceback)
                requeues = bool(getattr(error, "requeue", False))
            else:
                runtime = time.monotonic() - call.started_s
                if meta is not None and self._stores and plan.has_listeners():
                    # Whoever is called now may end the process: the success is to be known before.
                    self._ends.pipe.state(task_id, SUCCESS, meta)
                if plan.on_success is not None:
                    self._handler(plan.on_success, value, task_id, args, kwargs)
                if signals.task_success.receivers:
                    signals.task_success.send(sender=task, result=value, runtime=runtime)
                if self._logs_info or call.wants_report:
                    text = saferepr(value, plan.repr_limit)
                    report = {"result": text}
                    if self._logs_info:
                        self._log_success(task, request, text, runtime)
                if plan.after_return is not None:
                    self._handler(plan.after_return, state, value, task_id, args, kwargs, None)
        finally:
            try:
                if signals.task_postrun.receivers:
                    signals.task_postrun.send(
                        sender=task, task_id=task_id, task=task, args=args, kwargs=kwargs, retval=value, state=state
                    )
            finally:
                self._running.pop()
                plan.requests.pop()
                for cleanup in plan.cleanup:
                    self._handler(cleanup)
        assert state is not None  # what leaves it open ends the process
        self._ends.finish(call, state, meta, report, requeues)

    def _success_meta(self, call: Call, request: Context, task: Any, value: Any) -> bytes:
        if request._children is None and not self._extended and request.group is None and request.parent_id is None:
            try:
                meta = call.success_meta(encode_json(value))
            except EncodeError:
                meta = None
            if meta is not None:
                return meta
        # Whatever is out of the ordinary: Celery's own words, and its own errors.
        backend = task.backend
        fields = backend._get_result_meta(backend.encode_result(value, SUCCESS), SUCCESS, None, request)
        fields["task_id"] = call.id
        return encoded_by(backend, fields)

    def _raised(self, task: Any, request: Context, error: BaseException) -> tuple[str, Any, Any]:
        """Let Celery's own code record an exception; return state, value and what monitors are told.

        Called while the exception is being handled, as that code looks for it there.
        """
        if isinstance(error, Retry):
            info = TraceInfo(RETRY, error)
            einfo = info.handle_error_state(task, request, eager=False, call_errbacks=False)
            return RETRY, error, exception_report(error.exc, einfo.traceback)
        if isinstance(error, Reject):
            TraceInfo(REJECTED, error).handle_reject(task, request)
            return REJECTED, error, REQUEUED if error.requeue else ExceptionInfo()
        if isinstance(error, Ignore):
            TraceInfo(IGNORED, error).handle_ignore(task, request)
            return IGNORED, error, {}
        einfo = TraceInfo(FAILURE, error).handle_error_state(task, request, eager=False, call_errbacks=True)
        if task_has_custom(task, "after_return"):
            self._handler(task.after_return, FAILURE, error, request.id, request.args, request.kwargs, None)
        return FAILURE, error, exception_report(einfo.exception, einfo.traceback)

    def _handler(self, handler: Callable[..., Any], *args: Any) -> None:
        """Call one of the task's handlers; what it raises is logged, as the task's outcome stands already."""
        try:
            handler(*args)
        except (Reject, MemoryError):
            raise
        except Exception:
            logger.exception("task handler %r failed", getattr(handler, "__qualname__", handler))

    def _log_success(self, task: Any, request: Context, text: str, runtime: float) -> None:
        context = {
            "id": request.id,
            "name": request.shadow or task.name,
            "return_value": text,
            "runtime": runtime,
            "args": request.get("argsrepr") or saferepr(request.args),
            "kwargs": request.get("kwargsrepr") or saferepr(request.kwargs),
        }
        logger.info(trace.LOG_SUCCESS, context, extra={"data": context})
