"""A child: takes calls from the main process, runs them one at a time, reports how each ended. No sockets, no loop.

``Runner.run`` is the straight line of a call. The only broad ``except`` of fastq is in it, around user code.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fastq.app import FastQ
from fastq.codecs import accepted, compression
from fastq.codecs import decode as decode_content
from fastq.codecs.json import decode as decode_json
from fastq.codecs.json import encode as encode_json
from fastq.codecs.meta import encode_meta
from fastq.errors import (
    ContentDisallowed,
    DecodeError,
    EncodingDisallowed,
    Ignore,
    NotRegistered,
    PublishError,
    Reject,
    RemoteProtocolError,
    Retry,
    SoftTimeLimitExceeded,
)
from fastq.interfaces import Meta, ResultStore, Unwatch
from fastq.pool.process import LIMIT_SIGNAL, Timer, set_name
from fastq.pool.titles import set_title
from fastq.request import Request, pop_request, push_request
from fastq.results import open_store
from fastq.running.birth import MemoryLimit, Signals, wait_for_threads, write_stacks_to
from fastq.running.messages import TaskLog, retry_reason
from fastq.states import FAILURE, REJECTED, RETRY, STARTED, SUCCESS
from fastq.steps.retry import on_exception
from fastq.task import ExceptionInfo, Task
from fastq.wire.call import Call
from fastq.wire.message import Message
from fastq.wire.pipe import OUTCOME_NAMES, ChildPipe

_SUCCESS, _FAILURE, _RETRY, _IGNORED, _REJECTED, _REQUEUE, _MALFORMED, _RETURNED, _UNKNOWN = range(len(OUTCOME_NAMES))

#: Chosen: characters of a decoder's words that a refused message's sender is told.
MAX_DETAIL = 500

#: Exit code of a child that was asked to end, as Celery's recycled children have.
EX_RECYCLE = 155

logger = logging.getLogger("fastq.app.trace")


class ChildSetup(Protocol):
    """What surrounds the calls of a child and goes by its number, 1 or more."""

    def __call__(self, number: int) -> None:
        """Begin with the number that the child is born with."""

    def renumber(self, before: int, number: int) -> None:
        """Go on with the number of the slot that the child takes its calls in."""


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """What every child of a pool is told at its birth."""

    hostname: str
    max_memory_kib: int = 0
    track_started: bool = False
    is_amqp: bool = False  # messages come from a broker that speaks AMQP
    program: str = "fastq"  # what the process's title begins with
    setup: ChildSetup | None = None  # logging and the like


class Malformed(DecodeError):
    """A message body that is not a task's: the class that it is counted under, and for its sender what is wrong."""

    def __init__(self, kind: str, detail: object = "") -> None:
        super().__init__(kind, str(detail)[:MAX_DETAIL])

    @property
    def report(self) -> str:
        """Return both as the main process reads them."""
        return "\n".join(filter(None, self.args))


# --- what the task API sees of the outside ----------------------------------------------------------------------------


class PipePublisher:
    """The child's Publisher: the main process confirms the messages before it settles the running call."""

    def __init__(self, pipe: ChildPipe) -> None:
        self._pipe = pipe

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Hand the messages to the main process."""
        for message in messages:
            self._pipe.publish(message)

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Nothing to do: the main process declares what it publishes to."""

    def purge(self, queue: str) -> int:
        """Raise PublishError: this process has no connection."""
        raise PublishError("queues cannot be purged from inside a task; use `fastq purge`")

    def depth(self, queue: str) -> int:
        """Raise PublishError: this process has no connection."""
        raise PublishError("queue depths cannot be read from inside a task")

    def close(self) -> None:
        """Nothing to do: the pipe lives as long as the child."""


class PipeStore:
    """The child's ResultStore: states go to the main process, the rest to a store of its own, opened at first use."""

    def __init__(self, pipe: ChildPipe, open_store: Callable[[], ResultStore]) -> None:
        self._pipe = pipe
        self._open = open_store
        self._store: ResultStore | None = None

    @property
    def _own(self) -> ResultStore:
        if self._store is None:
            self._store = self._open()
        return self._store

    def reply_address(self, deadline: float | None = None) -> str | None:
        """Return the own store's address."""
        return self._own.reply_address(deadline)

    def load(self, task_id: str) -> Meta | None:
        """Ask the own store."""
        return self._own.load(task_id)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Wait at the own store."""
        return self._own.wait(task_id, timeout_s)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Watch at the own store."""
        return self._own.watch(task_id, callback)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Hand the state to the main process."""
        self._pipe.state(task_id, state, meta)

    def forget(self, task_id: str) -> None:
        """Forget at the own store."""
        self._own.forget(task_id)

    def close(self) -> None:
        """Close the own store if it was opened."""
        if self._store is not None:
            self._store.close()


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_call(call: Call, accept: frozenset[str]) -> tuple[list[Any], dict[str, Any], dict[str, Any] | None]:
    """Return the three parts of a call's body: arguments, keyword arguments, follow-ups. Raises Malformed."""
    if call.json_body:
        try:
            payload = decode_json(call.body)
        except DecodeError as error:
            raise Malformed("empty-body" if not call.body else "json", error) from error
    else:
        payload = _decode_other(call, accept)
    if type(payload) is not list or len(payload) != 3:
        if isinstance(payload, (list, tuple)) and len(payload) == 3:
            payload = list(payload)
        else:
            raise Malformed("body-shape")
    args, kwargs, embed = payload
    if type(args) is not list:
        if not isinstance(args, tuple):
            raise Malformed("args")
        args = list(args)
    if type(kwargs) is not dict:
        if kwargs is not None:
            raise Malformed("kwargs")
        kwargs = {}
    for name in kwargs:
        if type(name) is not str:
            raise Malformed("kwargs")
    if embed is not None:
        if type(embed) is not dict:
            raise Malformed("embed")
        # To run the task and forget what is to follow it would lose work without a word.
        if any(embed.values()):
            raise Malformed("follow-ups")
    return args, kwargs, embed


def _decode_other(call: Call, accept: frozenset[str]) -> Any:
    """Anything but plain JSON: another serializer, a compressed body, an unusual charset."""
    try:
        properties = call.properties()
    except Exception as error:  # the wire layer's own errors: nested too deep, cut short
        raise Malformed("properties", error) from error
    body = call.body
    name = call.headers().get("compression")
    if name is not None:
        try:
            body = compression.decompress(body, name if isinstance(name, str) else repr(name))
        except DecodeError as error:
            raise Malformed("compression", error) from error
    content_type = properties.get("content_type") or "application/json"
    try:
        return decode_content(body, content_type, properties.get("content_encoding"), accept)
    except ContentDisallowed as error:
        raise Malformed("content-type", error) from error
    except EncodingDisallowed as error:
        raise Malformed("content-encoding", error) from error
    except DecodeError as error:
        raise Malformed("body", error) from error


#: A handler that the task overrides, None for one that would do nothing.
Handler: TypeAlias = "Callable[..., None] | None"


# --- running ----------------------------------------------------------------------------------------------------------


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
    """Runs calls and reports their outcomes on the pipe."""

    def __init__(self, app: FastQ, options: ChildOptions) -> None:
        self._pipe: ChildPipe
        self._hostname = options.hostname
        self._memory = MemoryLimit(options.max_memory_kib, logging.getLogger("fastq.worker").warning)
        self._accept = accepted(app.conf.accept_content)
        self._extended = app.conf.result_extended
        self._plans = {name: Plan(task, options.track_started) for name, task in app.tasks.items()}
        self._log = TaskLog(logger)
        self._logs_info = logger.isEnabledFor(logging.INFO)
        self._timer: Timer
        self._limited: Call | None = None  # the call that runs under a soft time limit

    def serve(self, pipe: ChildPipe) -> None:
        """Run calls until the pipe ends."""
        self._pipe = pipe
        signal.signal(LIMIT_SIGNAL, self._on_limit)
        self._timer = Timer(LIMIT_SIGNAL)
        pipe.ready()
        run, take = self.run, pipe.next
        while (call := take()) is not None:
            run(call)

    def run(self, call: Call) -> None:
        """Run one call and report how it ended. Raises nothing but what ends the process."""
        plan = self._plans.get(call.name)
        if plan is None:
            self._unknown(call)
            return
        try:
            args, kwargs, embed = decode_call(call, self._accept)
        except Malformed as error:
            self._pipe.finish(call, _MALFORMED, None, error.report)
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
                    value = self._run_limited(plan, call, args, kwargs)
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
            self._pipe.finish(call, _SUCCESS, meta, report, self._memory.flag() if self._memory.limit_kib else 0)
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
            self._pipe.finish(call, _IGNORED, None, None, self._memory.flag())
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
        self._pipe.finish(call, _RETRY, meta, report, self._memory.flag())

    def _rejected(self, call: Call, request: Request, error: Reject) -> None:
        self._log.rejected(call.name, call.id, str(error.reason))
        if error.requeue:
            self._pipe.finish(call, _REQUEUE, None, _report(call, requeue=True), self._memory.flag())
            return
        meta = self._meta(call, request, REJECTED, str(error.reason)) if call.wants_result else None
        # For the dead letters, then for monitors.
        text = "\n".join([" ".join(str(error.reason).split())[:MAX_DETAIL], _report(call, requeue=False) or ""])
        self._pipe.finish(call, _REJECTED, meta, text, self._memory.flag())

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
        self._pipe.finish(call, _FAILURE, meta, report, self._memory.flag())

    def _unknown(self, call: Call) -> None:
        self._log.unregistered(call.name, call.id)
        meta = encode_meta(call.id, FAILURE, NotRegistered(call.name)) if call.wants_result else None
        self._pipe.finish(call, _UNKNOWN, meta)

    # --- parts

    def _run_limited(self, plan: Plan, call: Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run with a timer that raises SoftTimeLimitExceeded in the task."""
        self._limited = call
        self._timer.set(call.soft_time_limit)
        try:
            return plan.function(*args, **kwargs)
        finally:
            self._limited = None
            self._timer.set(0)

    def _on_limit(self, signum: int, frame: object) -> None:
        call = self._limited
        # The time is looked at because a signal for the call before may be late.
        if call is not None and time.monotonic() - call.started_s >= call.soft_time_limit:
            self._limited = None
            raise SoftTimeLimitExceeded()

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
    """The traceback as text, without fastq's own first frame."""
    tb = error.__traceback__
    if tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb))


# --- the process ------------------------------------------------------------------------------------------------------


class ChildMain:
    """What the zygote calls in each child it forks. All that children share is prepared here, before the fork."""

    def __init__(self, app: FastQ, options: ChildOptions) -> None:
        self._app = app
        self._options = options
        self._runner = Runner(app, options)

    def __call__(self, sock: int, shared: int, slot: int) -> int:
        """Run calls until the main process says stop or goes away; returns the exit code."""
        app = self._app
        pipe = ChildPipe(sock, shared)
        write_stacks_to(shared)
        set_name(b"fastq-child")
        Signals(pipe)
        pipe.on_slot = lambda taken: self._renumber(slot + 1, taken + 1)
        self._entitle(slot + 1)
        if self._options.setup is not None:
            self._options.setup(slot + 1)
        app.publisher = PipePublisher(pipe)
        if app.stores_results:
            app.store = PipeStore(pipe, lambda: open_store(app.conf.result_backend or "", app.conf))
        code = EX_RECYCLE
        try:
            self._runner.serve(pipe)
            wait_for_threads()
        except SystemExit as exit_:  # the call was terminated
            code = exit_.code if isinstance(exit_.code, int) else 1
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return code & 0xFF

    def _renumber(self, before: int, number: int) -> None:
        self._entitle(number)
        if self._options.setup is not None:
            self._options.setup.renumber(before, number)

    def _entitle(self, number: int) -> None:
        set_title(self._options.program, self._options.hostname, f"ForkPoolWorker-{number}")
