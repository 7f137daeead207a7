"""Results as replies over RabbitMQ (``rpc://``): one reply queue for each process, read by whoever waits.

A result is kept in this process only and reaches no other one. There are no threads, except one while somebody watches.
Source: Celery's rpc backend (queue, properties and body of a reply), so that either side may be Celery.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from fastq import codecs
from fastq.brokers import try_broker
from fastq.brokers.rabbitmq.connection import ADMIN_CHANNEL, BlockingConnection, Event, connect_any
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.codecs.meta import decode_meta
from fastq.errors import (
    ConnectionLost,
    DecodeError,
    FastqError,
    RemoteProtocolError,
    ResultTimeout,
    SettingsError,
)
from fastq.net import forks
from fastq.states import FAILURE, READY_STATES
from fastq.wire.amqp import METHODS
from fastq.wire.properties import decode_properties

if TYPE_CHECKING:
    from fastq.interfaces import Meta, Unwatch
    from fastq.settings import Settings

logger = logging.getLogger(__name__)

Callback: TypeAlias = "Callable[[Meta], None]"

CHANNEL = 1
BASIC_DELIVER, BASIC_CANCEL = METHODS["basic.deliver"], METHODS["basic.cancel"]

MAX_REPLIES = 10_000  # kept although nobody has asked for them; more are kept as long as they are small:
MAX_REPLY_BYTES = 64 << 20
IDLE_CHECK_S = 1.0  # chosen: the connection is looked at before use when nobody has read from it for so long
LINGER_S = 5.0  # chosen: the thread that calls back stays for so long, as the next watcher is likely to come soon
FOREVER_S = 1e9
CLOSE_TIMEOUT_S = 2.0


class Reply(NamedTuple):
    """A state as it came; decoded when somebody asks for it."""

    body: bytes
    content_type: str
    content_encoding: str | None

    def decode(self, accept: frozenset[str]) -> Meta:
        """Return the meta. Raises DecodeError."""
        if self.content_type == "application/json":
            return decode_meta(self.body)
        meta = codecs.decode(self.body, self.content_type, self.content_encoding, accept)
        if not isinstance(meta, dict) or not isinstance(meta.get("status"), str):
            raise DecodeError("a reply is not a task state")
        return meta

    def final(self, accept: frozenset[str]) -> Meta | None:
        """Return the meta if the task has ended. Raises DecodeError."""
        meta = self.decode(accept)
        return meta if meta["status"] in READY_STATES else None


class Replies:
    """The latest state of each task, bounded: the oldest make room when there are many and they are large."""

    def __init__(self) -> None:
        self._replies: OrderedDict[str, Reply] = OrderedDict()
        self._bytes = 0
        self._dropped = 0

    def get(self, task_id: str) -> Reply | None:
        """Return the latest reply for a task."""
        return self._replies.get(task_id)

    def put(self, task_id: str, reply: Reply) -> None:
        """Keep a reply in place of an earlier one."""
        self.pop(task_id)
        self._replies[task_id] = reply
        self._bytes += len(reply.body)
        while len(self._replies) > MAX_REPLIES and self._bytes > MAX_REPLY_BYTES:
            self._drop_oldest()

    def pop(self, task_id: str) -> None:
        """Forget a task's reply."""
        reply = self._replies.pop(task_id, None)
        if reply is not None:
            self._bytes -= len(reply.body)

    def _drop_oldest(self) -> None:
        _, reply = self._replies.popitem(last=False)
        self._bytes -= len(reply.body)
        if self._dropped == 0:
            logger.warning(
                "rpc:// holds more than %d results and %d MiB that nobody has fetched; the oldest are dropped. "
                "Fetch results sooner, or set ignore_result",
                MAX_REPLIES,
                MAX_REPLY_BYTES >> 20,
            )
        self._dropped += 1


class RpcStore:
    """ResultStore for rpc:// (the protocol is ``interfaces.ResultStore``).

    One thread at a time reads the socket (it *leads*); the others wait to be told, and one takes over when it leaves.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        broker = try_broker(settings.broker_url)
        if broker is None or not broker.speaks_amqp:
            raise SettingsError("result_backend 'rpc://' needs an amqp:// broker; with another one leave it unset")
        self._settings = settings
        self._endpoints = Endpoints(settings.broker_url or "", settings)
        self._accept = codecs.accepted(settings.accept_content)
        self._timeout_s = settings.fastq_publish_timeout
        self._start_over()
        STORES.add(self)
        forks.register(self)

    def _start_over(self) -> None:
        """Be as new: at first, and in a forked child, where the queue and the connection are the parent's."""
        self.queue = str(uuid.uuid4())
        self._changed = threading.Condition()
        self._connection: BlockingConnection | None = None
        self._replies = Replies()
        self._watched: dict[str, list[Callback]] = {}
        self._due: list[tuple[Callback, Meta]] = []
        self._watcher: threading.Thread | None = None
        self._is_led = False
        self._is_closed = False
        self._read_at = 0.0
        # Counts the times that replies were lost: who was waiting then waits in vain.
        self._losses = 0
        self._loss = ""

    # --- the protocol

    def reply_address(self, deadline: float | None = None) -> str:
        """Return the reply queue's name; the queue exists and is read from. Raises ConnectionLost or SettingsError."""
        connection = self._connection
        if connection is None or time.monotonic() - self._read_at > IDLE_CHECK_S or connection.has_news():
            # It may be the connection's end: who sends the address of a queue that went with it waits for ever.
            self._refresh(deadline)
            if self._connection is None:
                raise ConnectionLost(self._loss)
        return self.queue

    def load(self, task_id: str) -> Meta | None:
        """Return the latest state that has arrived for a task, None when none has. Raises DecodeError."""
        if self._connection is not None:
            self._refresh()
        reply = self._replies.get(task_id)
        return None if reply is None else reply.decode(self._accept)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state has come. Raises ResultTimeout, DecodeError, ConnectionLost when it cannot come."""
        deadline = time.monotonic() + (FOREVER_S if timeout_s is None else timeout_s)
        losses = self._losses
        while True:
            with self._changed:
                reply = self._replies.get(task_id)
                if reply is not None and (meta := reply.final(self._accept)) is not None:
                    return meta
                if self._losses != losses:
                    raise ConnectionLost(self._loss)
                if (left_s := deadline - time.monotonic()) <= 0:
                    raise ResultTimeout(f"no result of task {task_id} within {timeout_s} s")
                if self._is_led:
                    self._changed.wait(left_s)
                    continue
                self._is_led = True
            self._lead(partial(self._has_news, task_id, reply), deadline)

    def watch(self, task_id: str, callback: Callback) -> Unwatch:
        """Call back once, from a thread of this store, when a final state has arrived or can no longer arrive.

        Returns what ends the watch.
        """
        with self._changed:
            self._watched.setdefault(task_id, []).append(callback)
            self._note_due(task_id)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch_all, name="fastq-rpc-results", daemon=True)
                self._watcher.start()
            self._changed.notify_all()
        return partial(self._unwatch, task_id, callback)

    def _unwatch(self, task_id: str, callback: Callback) -> None:
        with self._changed:
            callbacks = self._watched.get(task_id, [])
            if callback in callbacks:
                callbacks.remove(callback)
                if not callbacks:
                    del self._watched[task_id]

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Refuse: only the worker that runs the task knows where its reply goes."""
        raise SettingsError(
            f"rpc:// cannot store state {state} ({len(meta)} bytes) of task {task_id} from here: a reply goes from the "
            "worker to the caller. Use a result_backend that stores, such as sqlite:///results.db"
        )

    def forget(self, task_id: str) -> None:
        """Drop what has arrived for a task."""
        with self._changed:
            self._replies.pop(task_id)

    def close(self) -> None:
        """Close the connection; the reply queue goes with it. A later call opens new ones."""
        with self._changed:
            self._is_closed = True
            connection, self._connection = self._connection, None
            watcher = self._watcher
            if connection is not None and self._is_led:
                connection.interrupt()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_led, timeout=CLOSE_TIMEOUT_S)
        if connection is not None:
            connection.close()
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(CLOSE_TIMEOUT_S)

    def after_fork(self) -> None:
        """In a forked child: leave the parent's connection alone; an own queue is made when it is needed."""
        connection = self._connection
        self._start_over()
        if connection is not None:
            connection.abandon()

    # --- reading: by the thread that leads

    def _lead(self, done: Callable[[], bool], deadline: float, connected_by: float | None = None) -> None:
        """Read replies until ``done`` or the deadline. The caller has taken the lead; it is given up here.

        A connection that is lost meanwhile is made again by ``connected_by``, or the deadline.
        """
        try:
            connection = self._connection
            if connection is None:
                connection = self._connect()
            while not done():
                event = connection.next_event(deadline)
                self._read_at = time.monotonic()
                if event is None:
                    return
                self._take(connection, [event, *connection.take_events()])
        except FastqError as error:
            self._recover(error, deadline if connected_by is None else connected_by)
        finally:
            self._stop_leading()

    def _refresh(self, deadline: float | None = None) -> None:
        """Connect if needed and take in what has come, without waiting for more; nothing if another thread leads."""
        until = time.monotonic() + self._timeout_s if deadline is None else deadline
        with self._changed:
            while self._is_led:
                if self._connection is not None:
                    return
                self._changed.wait(self._timeout_s)
            self._is_led = True
        try:
            connection = self._connection
            if connection is None:
                connection = self._connect(until)
            connection.refresh()
            self._read_at = time.monotonic()
            self._take(connection, connection.take_events())
        except FastqError as error:
            self._recover(error, until)
        finally:
            self._stop_leading()

    def _has_news(self, task_id: str, seen: Reply | None) -> bool:
        return self._replies.get(task_id) is not seen

    def _stop_leading(self) -> None:
        with self._changed:
            self._is_led = False
            self._changed.notify_all()

    def _take(self, connection: BlockingConnection, events: list[Event]) -> None:
        """Keep the replies among the events and wake who waits for one."""
        with self._changed:
            for event in events:
                if event.method_id == BASIC_DELIVER:
                    self._keep(event)
                elif event.method_id == BASIC_CANCEL:
                    raise ConnectionLost(f"the reply queue {self.queue} was deleted on the broker")
                else:
                    connection.check_channel(event)
            self._changed.notify_all()

    def _keep(self, event: Event) -> None:
        """Keep one reply. Call with the lock."""
        try:
            properties = decode_properties(event.props)
            task_id = properties["correlation_id"]
        except (RemoteProtocolError, KeyError) as error:
            logger.warning("a reply was dropped, it belongs to no task: %r", error)
            return
        reply = Reply(event.body, properties.get("content_type", ""), properties.get("content_encoding"))
        self._replies.put(task_id, reply)
        self._note_due(task_id)

    # --- the connection

    def _connect(self, deadline: float | None = None) -> BlockingConnection:
        """Return a connection that receives from the reply queue. Call with the lead."""
        self._is_closed = False
        connection = connect_any(self._endpoints, self._settings, "results", self._timeout_s, deadline)
        try:
            self._subscribe(connection)
        except BaseException:
            connection.close()
            raise
        with self._changed:
            self._connection = connection
        return connection

    def _subscribe(self, connection: BlockingConnection) -> None:
        # As Celery declares it, so that its tools know the queue. It goes when this connection does.
        expires_s = self._settings.result_expires
        arguments = {"x-expires": int(expires_s * 1000)} if expires_s else {}
        connection.rpc(CHANNEL, "queue.declare", queue=self.queue, durable=True, auto_delete=True, arguments=arguments)
        connection.rpc(CHANNEL, "basic.consume", queue=self.queue, no_ack=True)

    def _recover(self, error: FastqError, deadline: float) -> None:
        """Connect again after ``error``; unless the queue has outlived the connection, who waits is told.

        Call with the lead.
        """
        with self._changed:
            connection, self._connection = self._connection, None
        if self._is_closed:
            return self._lose("the result store was closed")
        if connection is None:
            # There was none to lose: this very call was to make it, and its caller shall hear why there is none.
            raise error
        connection.close()
        try:
            survived = self._reconnect(min(time.monotonic() + self._timeout_s, deadline))
        except ConnectionLost as failure:
            return self._lose(f"{failure}; results that were due are lost")
        if not survived:
            return self._lose(f"{error}; the reply queue went with it, and results that were due are lost")
        logger.warning("%s; connected again, the reply queue is still there", error)
        return None

    def _reconnect(self, give_up_at: float) -> bool:
        """Connect and subscribe, trying again until then; return whether the queue was still there."""
        pause_s = 0.05
        while True:
            try:
                return self._resubscribe(give_up_at)
            except ConnectionLost:
                if time.monotonic() + pause_s > give_up_at:
                    raise
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    def _resubscribe(self, deadline: float) -> bool:
        """Connect and subscribe; return whether the queue was still there."""
        probe = connect_any(self._endpoints, self._settings, "results", self._timeout_s, deadline)
        survived = True
        try:
            probe.rpc(ADMIN_CHANNEL, "queue.declare", queue=self.queue, passive=True)
        except SettingsError:
            survived = False
        finally:
            probe.close()
        self._connect(deadline)
        return survived

    def _lose(self, reason: str) -> None:
        """Tell everybody who waits or watches that the replies will not come."""
        with self._changed:
            self._losses += 1
            self._loss = reason
            for task_id, callbacks in self._watched.items():
                self._due += [(callback, lost_meta(task_id, ConnectionLost(reason))) for callback in callbacks]
            self._watched.clear()
            self._changed.notify_all()

    # --- the thread that calls back

    def _note_due(self, task_id: str) -> None:
        """Move the watchers of a task to those who are due, if it has ended. Call with the lock."""
        reply = self._replies.get(task_id)
        if reply is None or task_id not in self._watched:
            return
        try:
            meta = reply.final(self._accept)
        except DecodeError as error:
            meta = lost_meta(task_id, error)
        if meta is not None:
            self._due += [(callback, meta) for callback in self._watched.pop(task_id)]

    def _watch_all(self) -> None:
        while True:
            with self._changed:
                if not self._due and not self._watched:
                    self._changed.wait_for(lambda: self._is_closed or self._due or self._watched, LINGER_S)
                due, self._due = self._due, []
                if not due and not self._watched:
                    self._watcher = None
                    return
                if not due and self._is_led:
                    self._changed.wait()
                    continue
                self._is_led = self._is_led or not due
            for callback, meta in due:
                call(callback, meta)
            if not due:
                self._watch_some()

    def _watch_some(self) -> None:
        """Lead for a while, until somebody is due or nobody watches any more."""
        try:
            now = time.monotonic()
            self._lead(lambda: bool(self._due) or not self._watched, now + LINGER_S, connected_by=now + FOREVER_S)
        except FastqError as error:
            self._lose(str(error))


def lost_meta(task_id: str, error: FastqError) -> Meta:
    """Return a meta that raises ``error`` where the result is asked for."""
    return {
        "task_id": task_id,
        "status": FAILURE,
        "result": {"exc_type": type(error).__name__, "exc_message": [str(error)], "exc_module": "fastq.errors"},
        "traceback": None,
        "children": [],
    }


def call(callback: Callback, meta: Meta) -> None:
    """Call back; an error in foreign code is logged and ends nothing."""
    try:
        callback(meta)
    except Exception:
        logger.exception("a callback for the result of task %s failed", meta.get("task_id"))


STORES: weakref.WeakSet[RpcStore] = weakref.WeakSet()


def close_connections() -> None:
    """At exit: without a goodbye the broker logs an error for each connection."""
    for store in list(STORES):
        store.close()


atexit.register(close_connections)
