"""Results as replies over RabbitMQ (``rpc://``): one reply queue for each process, read by whoever waits.

A result is kept in this process only and reaches no other one. Source: Celery's rpc backend (queue, properties and body
of a reply), so that either side may be Celery.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastq import codecs
from fastq.brokers import try_broker
from fastq.brokers.rabbitmq.connection import ADMIN_CHANNEL, BlockingConnection, Event, connect_any
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.codecs.meta import decode_meta
from fastq.errors import ConnectionLost, DecodeError, FastqError, RemoteProtocolError, SettingsError
from fastq.net.urls import mask_url
from fastq.results import fitting_backend
from fastq.results.base import WaitingStore
from fastq.results.place import Heard, Place
from fastq.wire.amqp import METHODS
from fastq.wire.properties import decode_properties

if TYPE_CHECKING:
    from fastq.interfaces import Meta
    from fastq.settings import Settings

logger = logging.getLogger(__name__)

CHANNEL = 1
BASIC_DELIVER, BASIC_CANCEL = METHODS["basic.deliver"], METHODS["basic.cancel"]

MAX_REPLIES = 10_000  # kept although nobody has asked for them; more are kept as long as they are small:
MAX_REPLY_BYTES = 64 << 20
IDLE_CHECK_S = 1.0  # chosen: the connection is looked at before use when nobody has read from it for so long


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


class Replies:
    """The latest state of each task, bounded: the oldest make room when there are many and they are large.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replies: OrderedDict[str, Reply] = OrderedDict()
        self._bytes = 0
        self._dropped = 0

    def get(self, task_id: str) -> Reply | None:
        """Return the latest reply for a task."""
        return self._replies.get(task_id)

    def put(self, task_id: str, reply: Reply) -> None:
        """Keep a reply in place of an earlier one."""
        with self._lock:
            if task_id in self._replies:
                self._drop(task_id)
            self._replies[task_id] = reply
            self._bytes += len(reply.body)
            while len(self._replies) > MAX_REPLIES and self._bytes > MAX_REPLY_BYTES:
                self._drop_oldest()

    def pop(self, task_id: str) -> None:
        """Forget a task's reply."""
        with self._lock:
            if task_id in self._replies:
                self._drop(task_id)

    def _drop(self, task_id: str) -> None:
        self._bytes -= len(self._replies.pop(task_id).body)

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._replies)))
        if self._dropped == 0:
            logger.warning(
                "rpc:// holds more than %d results and %d MiB that nobody has fetched; the oldest are dropped. "
                "Fetch results sooner, or set ignore_result",
                MAX_REPLIES,
                MAX_REPLY_BYTES >> 20,
            )
        self._dropped += 1


class ReplyQueue(Place[Reply]):
    """This process's reply queue, and the replies that have come."""

    hears_all = True
    keeps = False
    thread_name = "fastq-rpc-results"
    logger = logger

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._endpoints = Endpoints(settings.broker_url or "", settings)
        self._accept = codecs.accepted(settings.accept_content)
        self.patience_s = settings.fastq_publish_timeout
        self._connection: BlockingConnection | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.name = str(uuid.uuid4())
        self.replies = Replies()
        self._read_at = 0.0
        self._error: FastqError | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection; it may have ended meanwhile."""
        return self._connection is not None

    def is_fresh(self) -> bool:
        """Whether the connection stands, as far as is known without reading from it."""
        connection = self._connection
        return connection is not None and time.monotonic() - self._read_at <= IDLE_CHECK_S and not connection.has_news()

    def look(self, task_ids: Sequence[str]) -> Mapping[str, Reply]:
        """Return what has come."""
        get = self.replies.get
        return {task_id: reply for task_id in task_ids if (reply := get(task_id)) is not None}

    def decode(self, state: Reply) -> Meta:
        """Return a reply's meta."""
        return state.decode(self._accept)

    def open(self, until: float) -> FastqError | None:
        """Connect and receive from the queue; say so if it has not outlived the connection before."""
        self.close()  # one that somebody made who was interrupted
        error, survived = self._error, True
        if error is not None:
            survived = self._is_there(until)
        connection = connect_any(self._endpoints, self._settings, "results", self.patience_s, until)
        try:
            self._subscribe(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._error = connection, None
        self._read_at = time.monotonic()
        if not survived:
            return ConnectionLost(f"{error}; the reply queue went with it, and results that were due are lost")
        if error is not None:
            logger.warning("%s; connected again, the reply queue is still there", error)
        return None

    def _is_there(self, until: float) -> bool:
        probe = connect_any(self._endpoints, self._settings, "results", self.patience_s, until)
        try:
            probe.rpc(ADMIN_CHANNEL, "queue.declare", queue=self.name, passive=True)
        except SettingsError:
            return False
        finally:
            probe.close()
        return True

    def _subscribe(self, connection: BlockingConnection) -> None:
        # As Celery declares it, so that its tools know the queue. It goes when this connection does.
        expires_s = self._settings.result_expires
        arguments = {"x-expires": int(expires_s * 1000)} if expires_s else {}
        connection.rpc(CHANNEL, "queue.declare", queue=self.name, durable=True, auto_delete=True, arguments=arguments)
        connection.rpc(CHANNEL, "basic.consume", queue=self.name, no_ack=True)

    def take(self) -> list[Heard[Reply]]:
        """Keep the replies that have come, and return them."""
        connection = self._connection
        assert connection is not None
        self._read_at = time.monotonic()
        heard: list[Heard[Reply]] = []
        try:
            for event in connection.drain():
                if event.method_id == BASIC_DELIVER:
                    heard += self._keep(event)
                elif event.method_id == BASIC_CANCEL:
                    raise ConnectionLost(f"the reply queue {self.name} was deleted on the broker")
                else:
                    connection.check_channel(event)
        except FastqError as error:
            self._error = error
            raise
        return heard

    def _keep(self, event: Event) -> list[Heard[Reply]]:
        try:
            properties = decode_properties(event.props)
            task_id = properties["correlation_id"]
        except (RemoteProtocolError, KeyError) as error:
            logger.warning("a reply was dropped, it belongs to no task: %r", error)
            return []
        reply = Reply(event.body, properties.get("content_type", ""), properties.get("content_encoding"))
        self.replies.put(task_id, reply)
        return [(task_id, reply)]

    def fileno(self) -> int:
        """Return the socket."""
        return -1 if self._connection is None else self._connection.sock.fileno()

    def close(self) -> None:
        """Close the connection; the queue goes with it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def forget(self) -> None:
        """Leave the connection alone; an own queue is made when it is needed."""
        connection, self._connection = self._connection, None
        self._start_over()
        if connection is not None:
            connection.abandon()


class RpcStore(WaitingStore[Reply]):
    """ResultStore for rpc:// (the protocol is ``interfaces.ResultStore``)."""

    _place: ReplyQueue

    def __init__(self, url: str, settings: Settings) -> None:
        broker = try_broker(settings.broker_url)
        if broker is None or not broker.speaks_amqp:
            url = str(settings.broker_url)
            raise SettingsError(
                f"result_backend 'rpc://' needs an amqp:// broker, and broker_url is {mask_url(url)}; "
                f"set result_backend to {fitting_backend(url)!r}"
            )
        super().__init__(ReplyQueue(settings))

    def reply_address(self, deadline: float | None = None) -> str:
        """Return the reply queue's name; the queue exists and is read from. Raises ConnectionLost or SettingsError."""
        if not self._place.is_fresh():
            # It may be the connection's end: who sends the address of a queue that went with it waits for ever.
            self._waiting.refresh(time.monotonic() + self._place.patience_s if deadline is None else deadline)
        return self._place.name

    def is_there(self) -> bool:
        """Return whether the reply queue is read from over a connection that stands."""
        return self._place.is_fresh()

    def load(self, task_id: str) -> Meta | None:
        """Return the latest state that has arrived for a task, None when none has. Raises DecodeError."""
        if self._place.is_open:
            with contextlib.suppress(ConnectionLost):
                self._waiting.refresh(time.monotonic() + self._place.patience_s)
        return super().load(task_id)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Refuse: only the worker that runs the task knows where its reply goes."""
        raise SettingsError(
            f"rpc:// cannot store state {state} ({len(meta)} bytes) of task {task_id} from here: a reply goes from the "
            "worker to the caller. Use a result_backend that stores, such as sqlite:///results.db"
        )

    def forget(self, task_id: str) -> None:
        """Drop what has arrived for a task."""
        self._place.replies.pop(task_id)
