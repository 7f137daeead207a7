"""Tasks that take their messages by a ``Strategy`` or ``Request`` of their own, as Celery's main process has them.

Their code runs in the recorder's thread. A message that they have stays unsettled until they acknowledge or reject it.
What they have the pool call goes to a child as a call of our own: no broker has seen it, so it may be pickled.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import celery
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.utils.imports import symbol_by_name
from celery.worker.request import Request, create_request_cls
from celery.worker.state import revoked, task_reserved

from fastq._core import Core
from fastq.celery.worker.consumer import Consumer
from fastq.celery.worker.requests import message_of
from fastq.celery.worker.threads import Recorder
from fastq.link import ACK, REJECT, REQUEUE, BatchSource, Delivery
from fastq.wire.message import encode_properties

logger = logging.getLogger("celery.worker.strategy")


#: What a call is named that is not one of a task. A broker's message with this name is one of an unknown task.
APPLY = "fastq.apply"

#: Headers of a task's message that are shown of its call while it runs.
_SHOWN = ("argsrepr", "kwargsrepr", "root_id", "parent_id", "group", "origin", "retries")


class Strategies:
    """Hands messages to strategies and requests, and their calls to children.

    Methods are called on the loop's thread; users' code in the recorder's.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, app: celery.Celery, consumer: Consumer, recorder: Recorder, core: Core
    ) -> None:
        self._loop = loop
        self._app = app
        self._recorder = recorder
        self._core = core
        self._calls = OwnCalls()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._classes: dict[str, type[Request]] = {}
        self.consumer = consumer.for_strategies(recorder.timer, self._park)
        self._receive = self.consumer.create_task_handler()
        core.add_source(self._calls)
        for task in app.tasks.values():
            options = core.tasks[task.name.encode()]
            if options.handed_in_turn:
                self.consumer.strategies.ours[task.name] = partial(self._reserve, task)
            if core.reliable and (options.handed_over or options.handed_in_turn):
                task.acks_late = True  # it is their code that acknowledges, and it asks the task when

    # --- messages

    def take(self, delivery: Delivery, revocations: Container[str] | None) -> None:
        """Give a delivery to its task's strategy or request."""
        self._recorder.put(partial(self._take, delivery, revocations))

    def request_of(self, delivery: Delivery) -> Any:
        """Return the request of a task that has its own Request class; the same for each time."""
        if delivery.request is None:
            message = self._message(delivery)
            task = self._app.tasks[message.headers["task"]]
            delivery.request = self._class_of(task)(
                message,
                on_ack=message.ack_log_error,
                on_reject=message.reject_log_error,
                app=self._app,
                hostname=self.consumer.hostname,
                eventer=self.consumer.event_dispatcher,
                task=task,
                connection_errors=self.consumer.connection_errors,
                body=message.body,
                headers=message.headers,
                decoded=False,
                utc=self._app.uses_utc_timezone(),
            )
        return delivery.request

    def _class_of(self, task: Any) -> type[Request]:
        found = self._classes.get(task.name)
        if found is None:
            base, consumer = symbol_by_name(task.Request), self.consumer
            found = self._classes[task.name] = create_request_cls(
                base, task, consumer.pool, consumer.hostname, consumer.event_dispatcher, app=self._app
            )
        return found

    def refresh(self) -> None:
        """Have strategies look again whether events are on."""
        self._classes.clear()

    def _message(self, delivery: Delivery) -> Any:
        return message_of(self._app, delivery.describe(), _Channel(delivery, self._judge))

    def _take(self, delivery: Delivery, revocations: Container[str] | None) -> None:
        message = self._message(delivery)
        if revocations is not None and message.headers["id"] in revocations:
            revoked.add(message.headers["id"])  # where Celery's own strategy looks
        self._receive(message)
        self.consumer.perform_pending_operations()

    def _reserve(self, task: Any, message: Any, payload: Any, ack: Any, reject: Any, callbacks: Any) -> None:
        request = self.request_of(message.channel.delivery)
        task_reserved(request)
        for callback in callbacks:
            callback(request)
        self.consumer.on_task_request(request)

    def _judge(self, delivery: Delivery, verdict: int) -> None:
        self._loop.call_soon_threadsafe(self._core.judge, delivery, verdict)

    def _park(self, n: int) -> None:
        self._loop.call_soon_threadsafe(self._count_parked, n)

    def _count_parked(self, n: int) -> None:
        self._core.parked = max(0, self._core.parked + n)

    # --- calls

    def apply(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        accept_callback: Callable[..., Any] | None = None,
        callback: Callable[..., Any] | None = None,
        error_callback: Callable[..., Any] | None = None,
        timeout_callback: Callable[..., Any] | None = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        correlation_id: str | None = None,
        **others: Any,
    ) -> Job:
        """Have a child call the function, from any thread; return the call. What the pool of Celery ignores is ignored.

        Raises what pickling raises: a function or an argument that cannot be sent to another process.
        """
        body = pickle.dumps((function, args, kwargs))
        task_id = correlation_id or str(uuid4())
        job = Job(task_id, accept_callback, callback, error_callback, timeout_callback, soft_timeout, self._terminate)
        number = next(self._numbers)
        self._jobs[number] = job
        props = _properties(function, args, task_id, (timeout, soft_timeout))
        self._loop.call_soon_threadsafe(self._calls.receive, [(number, b"", props, body, 1)])
        return job

    def accepted(self, delivery: Delivery, pid: int) -> None:
        """A child has begun a call."""
        job = self._jobs[delivery.tag]
        self._recorder.put(partial(job.accepted, pid, time.monotonic()))

    def reported(self, delivery: Delivery, report: bytes) -> None:
        """A child has ended a call and says how."""
        self._recorder.put(partial(self._end, delivery, partial(self._jobs[delivery.tag].ended, report)))

    def failed(self, kind: str, delivery: Delivery, detail: Any) -> None:
        """A call has failed without its child, or was revoked."""
        self._recorder.put(partial(self._end, delivery, partial(self._jobs[delivery.tag].failed, kind, detail)))

    def _end(self, delivery: Delivery, tell: Callable[[], None]) -> None:
        try:
            tell()
            self.consumer.perform_pending_operations()
        finally:
            self._jobs.pop(delivery.tag, None)
            self._loop.call_soon_threadsafe(self._core.recorded, delivery, ACK)

    def _terminate(self, task_id: str, signum: int) -> None:
        self._loop.call_soon_threadsafe(self._core.terminate, {task_id}, signum)


def _properties(
    function: Callable[..., Any], args: tuple[Any, ...], task_id: str, limits: tuple[float | None, float | None]
) -> bytes:
    """Return the properties of a call. That of a task bears the task's name, for those who look at the worker."""
    headers: dict[str, Any] = {"lang": "py", "task": APPLY, "id": task_id, "timelimit": list(limits)}
    if function in (fast_trace_task, trace_task_ret):
        headers["task"] = args[0]
        request: Mapping[str, Any] = args[2]
        headers.update({name: request[name] for name in _SHOWN if name in request})
    return encode_properties(
        {
            "content_type": "application/x-python-serialize",
            "content_encoding": "binary",
            "correlation_id": task_id,
            "headers": headers,
        }
    )


class OwnCalls(BatchSource):
    """Brings calls that the main process makes. Nobody waits for their verdicts: their callbacks have told all."""

    def __init__(self) -> None:
        super().__init__()
        self.is_own = True

    def pull(self, n: int) -> None:
        """Nothing can be asked for."""

    def settle(self, batch: list[tuple[int, int]]) -> None:
        """Nothing is left to do."""


@dataclass(eq=False)
class Job:
    """A call of the pool, as its caller has it. The methods with a child's news are for the recorder's thread."""

    task_id: str
    accept_callback: Callable[..., Any] | None
    callback: Callable[..., Any] | None
    error_callback: Callable[..., Any] | None
    timeout_callback: Callable[..., Any] | None
    soft_timeout: float | None
    send_signal: Callable[[str, int], None]

    def terminate(self, signum: int) -> None:
        """End the child that runs the call by a signal; nothing happens when none does."""
        self.send_signal(self.task_id, signum)

    def accepted(self, pid: int, at: float) -> None:
        """A child has begun it."""
        if self.accept_callback is not None:
            self.accept_callback(pid, at)

    def ended(self, report: bytes) -> None:
        """A child has ended it: whether well, with what, and whether its soft limit had come."""
        ok, value, is_late = pickle.loads(report)  # noqa: S301  a child of ours has written it
        if is_late and self.timeout_callback is not None:
            self.timeout_callback(soft=True, timeout=self.soft_timeout)
        if ok and self.callback is not None:
            self.callback(value)
        if not ok and self.error_callback is not None:
            self.error_callback(value)

    def failed(self, kind: str, detail: Any) -> None:
        """It was ended, or not begun."""
        request = getattr(self.error_callback, "__self__", None)
        if kind in ("revoked", "terminated") and isinstance(request, Request):
            request._announce_revoked(kind, kind == "terminated", detail, False)
        elif self.error_callback is not None:
            self.error_callback(_error_of(kind, detail))
        if kind == "time-limit" and self.timeout_callback is not None:
            self.timeout_callback(soft=False, timeout=detail)


def _error_of(kind: str, detail: Any) -> ExceptionInfo:
    error: Exception
    if kind == "time-limit":
        error = TimeLimitExceeded(detail)
    elif kind == "lost":
        error = WorkerLostError(f"Worker exited prematurely: {detail}.")
    else:
        error = Terminated(detail)
    try:
        raise error
    except type(error):
        return ExceptionInfo()


class _Channel:
    """What a message of kombu's acknowledges itself to."""

    no_ack_consumers = None

    def __init__(self, delivery: Delivery, judge: Callable[[Delivery, int], None]) -> None:
        self.delivery = delivery
        self._judge = judge

    def basic_ack(self, delivery_tag: object, multiple: bool = False) -> None:
        """Settle the message as done."""
        self._judge(self.delivery, ACK)

    def basic_reject(self, delivery_tag: object, requeue: bool = False) -> None:
        """Drop the message, or put it back."""
        self._judge(self.delivery, REQUEUE if requeue else REJECT)
