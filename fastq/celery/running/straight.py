"""The way of calls that nobody but the task itself has a hand in: the result goes to the main process.

Around the task are Celery's request, stacks, signals and handlers, each where somebody would notice. An exception is
recorded by Celery's own code.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import celery
from billiard.einfo import ExceptionInfo
from celery import _state, signals
from celery.app import trace
from celery.app.task import Context
from celery.app.trace import TraceInfo, task_has_custom
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.saferepr import saferepr

from fastq.celery.running._request import faster, to_context
from fastq.celery.running.coroutines import own_handler, retried
from fastq.celery.running.ends import REQUEUED, Ends, encoded_by, exception_report
from fastq.celery.running.plan import Plan, ignores, is_default_loader
from fastq.codecs.json import encode as encode_json
from fastq.errors import EncodeError
from fastq.running.calls import awaited
from fastq.running.messages import TaskLog
from fastq.states import FAILURE, IGNORED, REJECTED, RETRY, STARTED, SUCCESS
from fastq.wire.call import Call

logger = logging.getLogger("celery.app.trace")

#: How a call ended: value or exception, state, result to store, what monitors are told, whether the message goes back.
End: TypeAlias = "tuple[Any, str, bytes | None, Any, bool]"


class Straight:
    """Runs calls past Celery's tracer. ``stores``: the main process stores results."""

    def __init__(self, app: celery.Celery, hostname: str, ends: Ends, limit: Any, stores: bool) -> None:
        self._hostname = hostname
        self._ends = ends
        self._limit = limit
        self._guards_all = limit.guards_all
        self._stores = stores
        self._extended = bool(app.conf.result_extended)
        self._log = TaskLog(logger)
        self._logs_info = False
        self._init_task = None if is_default_loader(app, "on_task_init") else app.loader.on_task_init

    def begin(self) -> None:
        """Look at what only the process knows that runs the calls."""
        self._logs_info = logger.isEnabledFor(logging.INFO)
        self._running = faster(_state._task_stack)

    def run(self, plan: Plan, call: Call, args: Any, kwargs: Any, fields: dict[str, Any]) -> None:
        """Run a call and report how it ended."""
        request = self._enter(plan, fields)
        end: End | None = None
        try:
            if plan.track_started or self._init_task is not None or signals.task_prerun.receivers:
                self._begin(plan, call, args, kwargs, fields, request)
            try:
                if plan.before_start is not None:
                    plan.before_start(call.id, args, kwargs)
                if call.soft_time_limit or self._guards_all:
                    value = self._limit.run(call, plan.function, args, kwargs)
                else:
                    value = plan.function(*args, **kwargs)
                meta = self._success_meta(call, request, plan.task, value) if call.wants_result else None
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                end = self._raised(plan.task, call, fields, request, error)
            else:
                end = value, SUCCESS, meta, None, False
                if (
                    plan.has_handlers
                    or self._logs_info
                    or call.wants_report
                    or signals.task_success.receivers
                    or signals.task_postrun.receivers
                ):
                    end = self._succeeded(plan, call, args, kwargs, request, value, meta)
        finally:
            self._leave(plan, call, args, kwargs, end)
        _, state, meta, report, requeues = end
        self._ends.finish(call, state, meta, report, requeues)

    async def run_async(self, plan: Plan, call: Call, args: Any, kwargs: Any, fields: dict[str, Any]) -> None:
        """Run a call of a coroutine function in the same way. What asks a result store or a broker runs in a thread."""
        import asyncio  # here it has been imported

        request = self._enter(plan, fields)
        end: End | None = None
        try:
            if plan.track_started:
                await asyncio.to_thread(self._begin, plan, call, args, kwargs, fields, request)
            elif self._init_task is not None or signals.task_prerun.receivers:
                self._begin(plan, call, args, kwargs, fields, request)
            try:
                if plan.before_start is not None:
                    await awaited(own_handler(plan.before_start), call.id, args, kwargs)
                value = await self._limit.run_async(call, plan.function, args, kwargs)
                meta = self._success_meta(call, request, plan.task, value) if call.wants_result else None
            except BaseException as error:
                if self._limit.is_cancelled(call):
                    raise
                end = await asyncio.to_thread(self._ended, plan.task, call, fields, request, error)
            else:
                end = value, SUCCESS, meta, None, False
                end = await self._succeeded_async(plan, call, args, kwargs, request, value, meta)
        finally:
            self._leave(plan, call, args, kwargs, end)
        self._ends.finish(call, *end[1:])

    def _ended(self, task: Any, call: Call, fields: dict[str, Any], request: Context, error: BaseException) -> End:
        """Record an exception in another thread than that which has raised it."""
        # Celery's code clears the frames of the traceback: not that of the coroutine which waits for this.
        traceback = error.__traceback__ = None if error.__traceback__ is None else error.__traceback__.tb_next
        other = retried(task, error, request.args, request.kwargs)
        try:  # Celery's code looks for the exception that is being handled
            raise other
        except BaseException as raised:
            if raised is error:
                raised.__traceback__ = traceback
            return self._raised(task, call, fields, request, raised)

    def _enter(self, plan: Plan, fields: dict[str, Any]) -> Context:
        request = to_context(fields)
        # Without a __call__ of its own the task is running already, for a call of itself by its own name.
        request._protected = int(plan.function is not plan.task)
        self._running.push(plan.task)
        plan.requests.push(request)
        return request

    def _begin(self, plan: Plan, call: Call, args: Any, kwargs: Any, fields: dict[str, Any], request: Context) -> None:
        task = plan.task
        if signals.task_prerun.receivers:
            signals.task_prerun.send(sender=task, task_id=call.id, task=task, args=args, kwargs=kwargs)
        if self._init_task is not None:
            self._init_task(call.id, task)
        if plan.track_started and not ignores(task, fields):
            started = {"pid": os.getpid(), "hostname": self._hostname}
            task.backend.store_result(call.id, started, STARTED, request=request)

    def _succeeded(
        self, plan: Plan, call: Call, args: Any, kwargs: Any, request: Context, value: Any, meta: bytes | None
    ) -> End:
        """Tell who listens of a success."""
        runtime = time.monotonic() - call.started_s
        self._announce(plan, call, meta)
        if plan.on_success is not None:
            self._handler(plan.on_success, value, call.id, args, kwargs)
        report = self._tell(plan, call, request, value, runtime)
        if plan.after_return is not None:
            self._handler(plan.after_return, SUCCESS, value, call.id, args, kwargs, None)
        return value, SUCCESS, meta, report, False

    async def _succeeded_async(
        self, plan: Plan, call: Call, args: Any, kwargs: Any, request: Context, value: Any, meta: bytes | None
    ) -> End:
        """Tell who listens of a coroutine's success; the task's handlers may be coroutine functions, too."""
        runtime = time.monotonic() - call.started_s
        self._announce(plan, call, meta)
        if plan.on_success is not None:
            await self._handler_async(call, plan.on_success, value, call.id, args, kwargs)
        report = self._tell(plan, call, request, value, runtime)
        if plan.after_return is not None:
            await self._handler_async(call, plan.after_return, SUCCESS, value, call.id, args, kwargs, None)
        return value, SUCCESS, meta, report, False

    def _announce(self, plan: Plan, call: Call, meta: bytes | None) -> None:
        """Have a success be known before somebody is called who may end the process."""
        has_listeners = plan.has_handlers or signals.task_success.receivers or signals.task_postrun.receivers
        if meta is not None and self._stores and has_listeners:
            self._ends.pipe.state(call.id, SUCCESS, meta)

    def _tell(self, plan: Plan, call: Call, request: Context, value: Any, runtime: float) -> Any:
        """Send the signal of a success and log it; return what monitors are told."""
        if signals.task_success.receivers:
            signals.task_success.send(sender=plan.task, result=value, runtime=runtime)
        if not (self._logs_info or call.wants_report):
            return None
        text = saferepr(value, plan.repr_limit)
        if self._logs_info:
            context = {
                "id": request.id,
                "name": request.shadow or plan.task.name,
                "return_value": text,
                "runtime": runtime,
                "args": request.get("argsrepr") or saferepr(request.args),
                "kwargs": request.get("kwargsrepr") or saferepr(request.kwargs),
            }
            logger.info(trace.LOG_SUCCESS, context, extra={"data": context})
        return {"result": text}

    def _leave(self, plan: Plan, call: Call, args: Any, kwargs: Any, end: End | None) -> None:
        try:
            if signals.task_postrun.receivers:
                task = plan.task
                value, state = (None, None) if end is None else end[:2]
                signals.task_postrun.send(
                    sender=task, task_id=call.id, task=task, args=args, kwargs=kwargs, retval=value, state=state
                )
        finally:
            self._running.pop()
            plan.requests.pop()
            for cleanup in plan.cleanup:
                self._handler(cleanup)

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

    def _raised(self, task: Any, call: Call, fields: dict[str, Any], request: Context, error: BaseException) -> End:
        """Let Celery's own code record an exception.

        Called while the exception is being handled, as that code looks for it there.
        """
        if isinstance(error, Retry):
            einfo = TraceInfo(RETRY, error).handle_error_state(task, request, eager=False, call_errbacks=False)
            return error, RETRY, None, exception_report(error.exc, einfo.traceback), False
        if isinstance(error, Reject):
            TraceInfo(REJECTED, error).handle_reject(task, request)
            return error, REJECTED, None, REQUEUED if error.requeue else ExceptionInfo(), bool(error.requeue)
        if isinstance(error, Ignore):
            TraceInfo(IGNORED, error).handle_ignore(task, request)
            return error, IGNORED, None, {}, False
        einfo = TraceInfo(FAILURE, error).handle_error_state(task, request, eager=False, call_errbacks=True)
        if task_has_custom(task, "after_return"):
            self._handler(task.after_return, FAILURE, error, request.id, request.args, request.kwargs, None)
        report = exception_report(einfo.exception, einfo.traceback)
        meta = self._ends.unaddressed_meta(call, task, fields, FAILURE, error, report["traceback"])
        return error, FAILURE, meta, report, False

    def _handler(self, handler: Callable[..., Any], *args: Any) -> None:
        """Call one of the task's handlers; what it raises is logged, as the task's outcome stands already."""
        try:
            handler(*args)
        except (Reject, MemoryError):
            raise
        except Exception as error:
            self._log.handler_failed(handler, error)

    async def _handler_async(self, call: Call, handler: Callable[..., Any], *args: Any) -> None:
        """Await one of the task's handlers in the same way, unless the call is to end."""
        try:
            await awaited(own_handler(handler), *args)
        except (Reject, MemoryError):
            raise
        except BaseException as error:
            if self._limit.is_cancelled(call):
                raise
            self._log.handler_failed(handler, error)
