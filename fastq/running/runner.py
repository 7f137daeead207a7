"""A call's straight line: decode, run, report how it ended. Takes no calls itself, and has no process of its own.

The only broad ``except`` of fastq is in ``Runner.run``, around user code.
"""

from __future__ import annotations

import inspect
import logging
import signal
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from typing import Any

from fastq.app import FastQ
from fastq.codecs import accepted
from fastq.codecs.json import encode as encode_json
from fastq.codecs.meta import encode_meta
from fastq.eager import finished
from fastq.errors import CallEnded, Ignore, NotRegistered, Reject, RemoteProtocolError, Retry, SoftTimeLimitExceeded
from fastq.request import Request, pop_request, push_request
from fastq.running.birth import ChildOptions, MemoryLimit
from fastq.running.calls import awaited, make_limit
from fastq.running.decode import MAX_DETAIL, Malformed, decode_call
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

    __slots__ = ("after_success", "around", "before", "function", "is_async", "task", "throws")

    def __init__(self, task: Task[..., Any], steps: Sequence[Step], has_loop: bool) -> None:
        self.task = task
        self.throws = task.throws
        # An overridden __call__ is the user's way to wrap the run; otherwise it would only cost a frame.
        self.function: Callable[..., Any] = task.run if type(task).__call__ is Task.__call__ else task
        self.is_async = task.is_async
        if self.is_async and not has_loop:
            from fastq.awaiting import running_here  # an event loop, which few need here

            self.function = running_here(self.function)
        self.around = Around(task, steps)
        if not (self.is_async and has_loop):
            self._finish_handlers()
        self.before = self.around.before
        self.after_success = self.around.after[SUCCESS]

    def _finish_handlers(self) -> None:
        """Have handlers that are coroutine functions run to their end where no loop awaits them."""
        if any(inspect.iscoroutinefunction(getattr(self.task, name)) for name in self.task.handlers):
            around = self.around
            around.before = tuple(map(_finishing, around.before))
            around.after = {state: tuple(map(_finishing, after)) for state, after in around.after.items()}


class End:
    """How a call ended that has raised: the state, what handlers are told, the traceback as text."""

    __slots__ = ("error", "info", "state", "text", "value")

    def __init__(self, plan: Plan, error: BaseException) -> None:
        error = plan.around.end_of(error)
        self.error: BaseException = error
        self.value: BaseException = error
        self.info: ExceptionInfo | None = None
        self.text = ""
        if isinstance(error, Ignore):
            self.state = IGNORED
        elif isinstance(error, Reject):
            self.state = REJECTED
        else:
            self.state = RETRY if isinstance(error, Retry) else FAILURE
            if isinstance(error, Retry) and error.exc is not None:
                self.value = error.exc
            self.text = _format(error)
            self.info = ExceptionInfo(self.value)


class Runner:
    """Runs calls and reports their outcomes on the pipe.

    What it knows of a call is in the call's request, which is the running one of its thread or coroutine.
    """

    def __init__(self, app: FastQ, options: ChildOptions) -> None:
        self._app = app
        self._pipe: ChildPipe
        self._hostname = options.hostname
        self._memory = MemoryLimit(options.max_memory_kib, logging.getLogger("fastq.worker").warning)
        self._accept = accepted(app.conf.accept_content)
        self._extended = app.conf.result_extended
        self._started = Started(options.hostname, options.track_started)
        steps = (*app.steps, self._started, *BUILT_IN)
        self._plans = {name: Plan(task, steps, options.calls == "loop") for name, task in app.tasks.items()}
        self.limit = make_limit(options.calls, lambda call: SoftTimeLimitExceeded())
        self._guards_all: bool = self.limit.guards_all
        # What a handler raises: a SystemExit, say, ends the process, unless other calls run in that.
        self._caught: type[BaseException] = BaseException if self._guards_all else Exception
        self._log = TaskLog(logger)
        self._logs_info = logger.isEnabledFor(logging.INFO)

    def begin(self, pipe: ChildPipe) -> None:
        """Get ready to run calls in this process and to report on that pipe."""
        self._pipe = self._started.outlet = pipe
        self.limit.begin()

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
                if call.soft_time_limit or self._guards_all:
                    value = self.limit.run(call, plan.function, args, kwargs)
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
                    except self._caught as error:
                        self._log.handler_failed(after, error)
            report = self._tell(call, request, value) if self._logs_info or call.wants_report else None
            self._pipe.finish(call, OUTCOME_SUCCESS, meta, report, self._memory.flag() if self._memory.limit_kib else 0)
        finally:
            pop_request()

    def is_async(self, call: Call) -> bool:
        """Return whether the call is one of a coroutine function."""
        plan = self._plans.get(call.name)
        return plan is not None and plan.is_async

    async def run_async(self, call: Call) -> bool:
        """Run a call of a coroutine function as ``run`` does others; its handlers may be coroutine functions, too."""
        plan = self._plans[call.name]
        try:
            args, kwargs, embed = decode_call(call, self._accept)
        except Malformed as error:
            self._pipe.finish(call, OUTCOME_MALFORMED, None, error.report)
            return True
        request = Request.from_call(call, args, kwargs, self._hostname, embed)
        push_request(request)  # in a context that ends with the call
        try:
            for before in plan.before:
                await awaited(before, call.id, args, kwargs)
            value = await self.limit.run_async(call, plan.function, args, kwargs)
            meta = None
            if call.wants_result:
                meta = self._meta(call, request, SUCCESS, value) if request.spawned or self._extended else None
                meta = meta or call.success_meta(encode_json(value)) or self._meta(call, request, SUCCESS, value)
        except BaseException as error:
            if self.limit.is_cancelled(call):
                self._pipe.cancelled(call)
                return True
            end = End(plan, error)
            for after in plan.around.after[end.state]:
                await self._after_async(after, call, end.state, end.value, args, kwargs, end.info)
            self._report(plan, call, request, end)
            return True
        for after in plan.after_success:
            await self._after_async(after, call, SUCCESS, value, args, kwargs, None)
        report = self._tell(call, request, value) if self._logs_info or call.wants_report else None
        self._pipe.finish(call, OUTCOME_SUCCESS, meta, report, self._memory.flag() if self._memory.limit_kib else 0)
        return True

    async def _after_async(
        self, after: After, call: Call, state: str, value: Any, args: Any, kwargs: Any, info: ExceptionInfo | None
    ) -> None:
        """Await a handler behind the task: the task's outcome stands, whatever it raises, unless the call is to end."""
        try:
            await awaited(after, state, value, call.id, args, kwargs, info)
        except BaseException as error:
            if self.limit.is_cancelled(call):
                raise
            self._log.handler_failed(after, error)

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Surround the calls of a loop with what the application has for that."""
        app = self._app
        span = None if app.lifespan is None else app.lifespan(app)
        if span is None:
            yield
        elif isinstance(span, AbstractAsyncContextManager):
            async with span as app.state:
                yield
        else:
            with span as app.state:
                yield

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
        if self.limit.is_cancelled(call):
            self._pipe.cancelled(call)
            return
        end = End(plan, error)
        for after in plan.around.after[end.state]:
            try:
                after(end.state, end.value, call.id, request.args, request.kwargs, end.info)
            except self._caught as raised:
                self._log.handler_failed(after, raised)
        self._report(plan, call, request, end)

    def _report(self, plan: Plan, call: Call, request: Request, end: End) -> None:
        {RETRY: self._retried, IGNORED: self._ignored, REJECTED: self._rejected, FAILURE: self._failed}[end.state](
            plan, call, request, end
        )

    def _ignored(self, plan: Plan, call: Call, request: Request, end: End) -> None:
        self._log.ignored(call.name, call.id)
        self._pipe.finish(call, OUTCOME_IGNORED, None, None, self._memory.flag())

    def _retried(self, plan: Plan, call: Call, request: Request, end: End) -> None:
        error: Any = end.error
        delay = None if error.when is None else max(0.0, round(error.when - time.time(), 1))
        why = None if error.exc is None else _bounded_repr(error.exc)
        self._log.retry(call.name, call.id, retry_reason(delay, why, call.retries + 1, plan.task.max_retries))
        meta = self._meta(call, request, RETRY, end.value, end.text) if call.wants_result else None
        report = _report(call, exception=_bounded_repr(end.value), traceback=end.text)
        self._pipe.finish(call, OUTCOME_RETRY, meta, report, self._memory.flag())

    def _rejected(self, plan: Plan, call: Call, request: Request, end: End) -> None:
        error: Any = end.error
        self._log.rejected(call.name, call.id, str(error.reason))
        if error.requeue:
            self._pipe.finish(call, OUTCOME_REQUEUE, None, _report(call, requeue=True), self._memory.flag())
            return
        meta = self._meta(call, request, REJECTED, str(error.reason)) if call.wants_result else None
        # For the dead letters, then for monitors.
        text = "\n".join([" ".join(str(error.reason).split())[:MAX_DETAIL], _report(call, requeue=False) or ""])
        self._pipe.finish(call, OUTCOME_REJECTED, meta, text, self._memory.flag())

    def _failed(self, plan: Plan, call: Call, request: Request, end: End) -> None:
        error, text = end.error, end.text
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


def _finishing(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any) -> None:
        finished(function(*args))

    return run


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
