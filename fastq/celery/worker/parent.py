"""The main process of a worker that runs a Celery application: its signals, and failures recorded by Celery's own code.

That code may block on a result store, so it runs in one thread of its own, in the order of what happened. So do the
receivers of signals and the code of tasks that have a strategy or a request class of their own: no event loop runs in
that thread, so they may start one, and nothing of theirs stops ours.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import celery
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery import signals
from celery.app.task import Context
from celery.exceptions import InvalidTaskError, NotRegistered, WorkerTerminate
from kombu import serialization
from kombu.exceptions import ContentDisallowed

from fastq._child import Child
from fastq._core import Core
from fastq.celery.running.chords import end_part, free_claim
from fastq.celery.worker.consumer import Heart, Pool, Worker
from fastq.celery.worker.requests import message_of, modern_form, request_of, waiting_on
from fastq.celery.worker.strategies import Strategies
from fastq.celery.worker.threads import Recorder
from fastq.guard import guarded
from fastq.interfaces import CallHooks
from fastq.link import ACK, REJECT, REQUEUE, Delivery
from fastq.running.decode import MAX_DETAIL
from fastq.states import FAILURE, PENDING, RECEIVED, REJECTED, RETRY
from fastq.wire.head import scan
from fastq.wire.properties import readable_properties
from fastq.worker.hooks import Hooks, refusal
from fastq.worker.remote.events import Events
from fastq.worker.remote.revoked import Revoked

logger = logging.getLogger("celery.worker.consumer")

#: States of a task that no worker has begun, or that is to be begun again.
_NOT_BEGUN = frozenset({PENDING, RECEIVED, RETRY, REJECTED})


@guarded(CallHooks, failure=(FAILURE, None))
class CeleryHooks(Hooks):
    """Answers the core as Celery's consumer would. ``consumer`` is set before the first call."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, app: celery.Celery, worker: Worker, on_running: Callable[[], None]
    ) -> None:
        super().__init__(loop, logging.getLogger("celery.worker.strategy"))
        self._app = app
        self._hostname = worker.hostname
        #: What signals get as their sender.
        self.consumer = worker.consumer
        self.consumer.event_dispatcher = Eventer(loop, lambda: self.events)
        self._on_running = on_running
        #: Where users' code runs.
        self.recorder = Recorder(self._on_exit)
        self._beats = False  # whether receivers of heartbeat_sent are yet to be called
        self._strategies: Strategies
        worker.pool = Pool(lambda *args, **options: self._strategies.apply(*args, **options), lambda: self.pool, app)

    def attach(self, core: Core, *parts: Any) -> None:
        """Belong to this message loop and to its pool."""
        core.reads_foreign = True
        self._strategies = Strategies(self._loop, self._app, self.consumer, self.recorder, core)
        super().attach(core, *parts)

    def watch(self, revoked: Revoked, events: Events | None) -> None:
        """Take part in remote control: the pool is there, and the steps may start."""
        super().watch(revoked, events)
        if events is not None and signals.heartbeat_sent.receivers:
            events.on_beat = partial(self._tell_beat, Heart(self.consumer, events.heartbeat_s))
        self._on_running()

    def refresh(self) -> None:
        """Say anew what is to be reported; strategies look again whether events are on."""
        super().refresh()
        self._strategies.refresh()

    @property
    def wants_received(self) -> bool:
        """Return whether each delivery is to be reported; receivers of ``task_received`` want it too."""
        return super().wants_received or bool(signals.task_received.receivers)

    def _tell_beat(self, heart: Heart) -> None:
        # Receivers that are slower than the heart are told once for what they have missed.
        if not self._beats:
            self._beats = True
            self.recorder.put(partial(self._send_beat, heart))

    def _send_beat(self, heart: Heart) -> None:
        self._beats = False
        signals.heartbeat_sent.send(sender=heart)

    def received(self, name: str, task_id: str, delivery: Delivery) -> bool:
        """Tell the log, the monitors and the receivers of ``task_received``. A task's own strategy does so itself.

        Receivers have their say before the task begins, as under Celery: the delivery waits for them.
        """
        options = self.core.tasks[name.encode()]
        if options.handed_over:
            self.look_for_stamps(task_id, delivery)
            return False
        super().received(name, task_id, delivery)
        if not signals.task_received.receivers:
            return False
        self.recorder.put(partial(self._tell_received, task_id, delivery, options.handed_in_turn))
        return True

    def refused(self, reason: str, queue: bytes, props: bytes, body: bytes) -> None:
        """Tell the log and the receivers of ``task_rejected``."""
        super().refused(reason, queue, props, body)
        if reason == "content-type":
            content_type = readable_properties(props).get("content_type")
            name = serialization.registry.type_to_name.get(content_type, content_type)
            logger.error("Refusing to deserialize disabled content of type %s (%s)", name, content_type)
        if signals.task_rejected.receivers:
            found = {"props": props, "body": body, "exchange": "", "routing_key": queue.decode("utf-8", "replace")}
            try:
                message = message_of(self._app, found | {"redelivered": False})
            except Exception:  # properties that cannot even be read
                message = None
            error = InvalidTaskError(reason)
            self.recorder.put(partial(signals.task_rejected.send, sender=self.consumer, message=message, exc=error))

    def foreign(self, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
        """Return a message of protocol 1 in today's form."""
        return modern_form(self._app, props, body)

    def failure(
        self, kind: str, name: str, task_id: str, detail: Any, delivery: Delivery
    ) -> tuple[str, bytes | None] | None:
        """Have Celery's own code record it; the message is settled when that is done, as that code says."""
        if delivery.is_own:
            self._strategies.failed(kind, delivery, detail)
            return None
        self.recorder.put(lambda: self._record(kind, name, task_id, detail, delivery))
        return None

    def handed(self, delivery: Delivery) -> None:
        """Give the message to its task's strategy or request."""
        self._strategies.take(delivery, self._revoked)

    def accepted(self, delivery: Delivery, pid: int) -> None:
        """Tell who has the pool call something that it has begun."""
        self._strategies.accepted(delivery, pid)

    def reported(self, delivery: Delivery, state: str, report: bytes | None) -> None:
        """Tell who has the pool call something how it ended; record a message that was rejected for good."""
        assert report is not None
        if delivery.is_own:
            self._strategies.reported(delivery, report)
        else:
            found = delivery.describe()
            name, task_id = (message_of(self._app, found).headers[key] for key in ("task", "id"))
            self.recorder.put(lambda: self._record("rejected", name, task_id, report, delivery))

    def hard_limit(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """A call ran past its hard limit: have the child write its stacks, then kill it. Celery's code logs it."""
        self.kill_with_stacks(child, name, task_id)

    def overdue(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """One of several calls of a child ran past its hard limit: Celery's code logs it."""

    def cancelled(self, name: str, task_id: str, delivery: Delivery) -> None:
        """Say so, and have Celery's code record a retry, as a worker of Celery's does."""
        super().cancelled(name, task_id, delivery)
        self.recorder.put(partial(self._announce_cancelled, delivery))

    def _announce_cancelled(self, delivery: Delivery) -> None:
        request = request_of(self._app, delivery.describe(), self._hostname, self.consumer.event_dispatcher)
        request._announce_cancelled()

    def mark_revoked(self, ids: Sequence[str]) -> None:
        """Store REVOKED for tasks, in the recorder's thread."""
        # A task may have a store of its own; which task an id is of is known of those that wait here.
        names = {row["id"]: row["name"] for row in (*self.core.reserved(), *self.core.scheduled())}
        for task_id in ids:
            self.recorder.put(partial(self._mark_revoked, task_id, names.get(task_id)))

    def _mark_revoked(self, task_id: str, name: str | None) -> None:
        close_databases(self._app)
        try:
            task = self._app.tasks.get(name)
            backend = self._app.backend if task is None else task.backend
            # Any other state, one of the task's own too, is that of a worker which has begun it, or its end.
            if backend.get_state(task_id) in _NOT_BEGUN:
                backend.mark_as_revoked(task_id, reason="revoked", store_result=True)
        except Exception as error:  # a store that has no states (rpc, none), or that is away
            logger.debug("task %s could not be marked as revoked: %r", task_id, error)

    def close(self) -> None:
        """Let the recorder finish what it has."""
        self.recorder.close()

    def _on_exit(self, error: SystemExit) -> None:
        logger.warning("The application's code in the main process asks the worker to stop: %r", error)
        worker = self.consumer.controller
        (worker.terminate if isinstance(error, WorkerTerminate) else worker.stop)()

    # --- in the recorder's thread

    def _tell_received(self, task_id: str, delivery: Delivery, has_own_request: bool) -> None:
        try:
            if has_own_request:
                request = self._strategies.request_of(delivery)
            else:
                request = request_of(self._app, delivery.describe(), self._hostname)
        except Exception as error:  # the child will find the same fault with it, and count it
            logger.debug("no request can be made of %s: %r", task_id, error)
            request = None
        try:
            if request is not None:
                signals.task_received.send(sender=self.consumer, request=request)
        finally:
            self._loop.call_soon_threadsafe(self.core.proceed, delivery)

    def _record(self, kind: str, name: str, task_id: str, detail: Any, delivery: Delivery) -> None:
        verdicts: list[int] = []
        found = delivery.describe()
        if kind == "unknown":
            self._log.unregistered(name, task_id)
        for is_last in (False, True):
            close_databases(self._app)
            try:
                if kind == "unknown":
                    verdicts.append(REJECT)
                    self._unknown(found, name, task_id)
                elif kind == "refused":
                    verdicts.append(REJECT)
                    self._tell_refused(found, name, task_id, detail)
                else:
                    self._request_method(kind, found, detail, verdicts)
                break
            except Exception:
                # Once more, as a store's connection that nobody has used for long fails the first who does.
                if is_last:
                    logger.exception("the failure of task %s[%s] could not be recorded", name, task_id)
        close_databases(self._app)
        verdict = verdicts[0] if verdicts else ACK
        reason = f"Reject: {_reason_of(detail)}" if kind == "rejected" else None
        self._loop.call_soon_threadsafe(self.core.recorded, delivery, verdict, reason)

    def _request_method(self, kind: str, found: dict[str, Any], detail: Any, verdicts: list[int]) -> None:
        request = request_of(
            self._app,
            found,
            self._hostname,
            self.consumer.event_dispatcher,
            on_ack=lambda *_: verdicts.append(ACK),
            on_reject=lambda _logger, _errors, requeue=False: verdicts.append(REQUEUE if requeue else REJECT),
        )
        free_claim(request.task.backend, request.id, request.group)
        if kind in ("expired", "revoked"):
            self.log_revoked(request.name, request.id)
            request._announce_revoked(kind, False, None, kind == "expired")
        elif kind == "terminated":
            request._announce_revoked("terminated", True, detail, False)
        elif kind == "time-limit":
            # Without a fraction where there is none: it is part of the stored exception.
            request.on_timeout(False, int(detail) if detail == int(detail) else detail)
        elif kind == "rejected":
            request.on_failure(pickle.loads(detail), return_ok=True)  # noqa: S301  a child of ours has written it
        else:
            request.on_failure(_lost(detail))
            end_part(request)

    def _unknown(self, found: dict[str, Any], name: str, task_id: str) -> None:
        message = message_of(self._app, found)
        error = NotRegistered(name)
        headers = {key: value for key, value in message.headers.items() if isinstance(key, str)}
        waiting = waiting_on(self._app, found["props"], found["body"])
        request = Context(headers, delivery_info=message.delivery_info, called_directly=False, **waiting)
        request.reply_to = message.properties.get("reply_to")
        request.correlation_id = message.properties.get("correlation_id")
        _fail(self._app.backend, task_id, error, request)
        self.consumer.event_dispatcher.send("task-failed", uuid=task_id, exception=repr(error))
        signals.task_unknown.send(sender=self.consumer, message=message, exc=error, name=name, id=task_id)

    def _tell_refused(self, found: dict[str, Any], name: str, task_id: str, detail: tuple[str, str]) -> None:
        """Store the failure of a message that cannot be run, and tell what waits for it. Its headers may be unsound."""
        known = scan(found["props"])
        task = self._app.tasks.get(name)
        ignores = known["ignore_result"]
        text = refusal(*detail)
        error = ContentDisallowed(text) if detail[0] == "content-type" else InvalidTaskError(text)
        request = Context(
            {"id": task_id, "task": name, "ignore_result": ignores},
            called_directly=False, delivery_info={}, **waiting_on(self._app, found["props"], found["body"]),
            reply_to=known["reply_to"] or None, correlation_id=known["correlation_id"] or task_id,
        )  # fmt: skip
        stores = not (ignores if ignores is not None or task is None else task.ignore_result)
        backend = (self._app if task is None else task).backend
        _fail(backend, task_id, error, request, stores)
        self.consumer.event_dispatcher.send("task-failed", uuid=task_id, exception=repr(error))


def _fail(backend: Any, task_id: str, error: Exception, request: Context, stores: bool = True) -> None:
    """Store a failure and tell what waits for it. Error callbacks are the application's: each is called once."""
    backend.mark_as_failure(task_id, error, request=request, store_result=stores, call_errbacks=False)
    if request.errbacks:
        try:
            backend._call_task_errbacks(request, error, None)
        except Exception:
            logger.exception("the error callbacks of task %s could not be called", task_id)


def close_databases(app: celery.Celery) -> None:
    """Close this thread's connections of Django, as Celery's fix-up does around each task: a server ends idle ones."""
    for fixup in app._fixups or ():
        worker = getattr(fixup, "worker_fixup", None)
        if worker is not None:
            worker.close_database()


def _reason_of(rejection: bytes) -> str:
    """Return on one line why a task has rejected its message; a child of ours has pickled it."""
    error = pickle.loads(rejection).exception  # noqa: S301
    return " ".join(str(getattr(error, "reason", error)).split())[:MAX_DETAIL]


def _lost(reason: str) -> ExceptionInfo:
    try:
        raise WorkerLostError(f"Worker exited prematurely: {reason}.")
    except WorkerLostError:
        return ExceptionInfo()


class Eventer:
    """What Celery's Request takes for its event dispatcher; for other threads than the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, get_events: Callable[[], Events | None]) -> None:
        self._loop = loop
        self._get_events = get_events

    @property
    def enabled(self) -> bool:
        """Return whether task events are on."""
        events = self._get_events()
        return events is not None and events.enabled

    def send(self, type: str, **fields: Any) -> None:
        """Send a task event."""
        if (events := self._get_events()) is not None:
            self._loop.call_soon_threadsafe(partial(events.send, type, **fields))

    def flush(self, **options: Any) -> None:
        """Nothing to do: events are sent soon by themselves."""
