"""Publishing to RabbitMQ from programs: confirmed, over a blocking socket, from any thread, across forks. No loop.

Retries are the caller's: ConnectionLost says that nothing was sent, PublishError that the fate is bad or unknown, and
which messages are to be sent again.
"""

from __future__ import annotations

import atexit
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fastq.brokers.limits import check_sizes
from fastq.brokers.rabbitmq.confirms import (
    BASIC_ACK,
    BASIC_NACK,
    BASIC_RETURN,
    CHANNEL,
    WINDOW,
    Confirms,
    blocked,
    not_confirmed,
    read_confirm,
    unknown_fate,
    windows,
)
from fastq.brokers.rabbitmq.connection import ADMIN_CHANNEL, FRAME_METHOD, BlockingConnection, Event, connect_any
from fastq.brokers.rabbitmq.tcp import lost
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.errors import ConnectionLost, FastqError, SettingsError
from fastq.net import forks
from fastq.queues import Topology
from fastq.wire.frames import publish_frames

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

__all__ = ["AmqpPublisher", "BlockingConnection"]

T = TypeVar("T")

IDLE_CHECK_S = 0.1  # chosen: a connection used more recently than this is not looked at before use

# What RabbitMQ answers to one message, all but the delivery tag: a basic.ack frame of 21 bytes.
ACK_HEAD = struct.pack(">BHII", FRAME_METHOD, CHANNEL, 13, BASIC_ACK)
ACK_TAIL = b"\x00\xce"


class AwaitedConfirms(Confirms):
    """Confirms that are read from a blocking connection."""

    def __init__(self, connection: BlockingConnection, messages: Sequence[Message]) -> None:
        super().__init__(connection, messages)
        self._connection = connection

    def take(self, event: Event) -> None:
        """Count a confirm or a returned message. Raises what a channel.close means."""
        if event.method_id == BASIC_ACK or event.method_id == BASIC_NACK:
            tag, is_multiple = read_confirm(event.method_id, event.arguments)
            done = [each for each in self.due if each <= tag] if is_multiple else [tag]
            for each in done:
                self.settle(each, event.method_id == BASIC_ACK)
        elif event.method_id == BASIC_RETURN:
            self.give_back(event.arguments, event.props)
        else:
            self._connection.check_channel(event)

    def wait(self, left: int, timeout_s: float) -> None:
        """Return when at most ``left`` confirms are due. Raises PublishError when none comes for too long."""
        deadline = time.monotonic() + timeout_s
        while (due := len(self.due)) > left:
            event = self._connection.next_event(deadline)
            if event is None:
                raise self.late()
            self.take(event)
            if len(self.due) < due:
                deadline = time.monotonic() + timeout_s


class AmqpPublisher:
    """Publisher for amqp:// and amqps:// (the protocol is ``interfaces.Publisher``).

    With the transport option ``confirm_publish`` off it waits for nothing: a message is lost when the broker goes away
    before it has read it, and a connection that was lost is noticed at the next message.
    """

    #: Whether a confirmed message that no queue takes is an error, and not dropped.
    mandatory = True

    def __init__(self, url: str | Sequence[str], settings: Settings) -> None:
        self._endpoints = Endpoints(url, settings)
        self._settings = settings
        self._topology = Topology(settings)
        self._timeout_s: float = settings.fastq_publish_timeout
        self._confirm = bool(settings.broker_transport_options.get("confirm_publish", True))
        self._connection: BlockingConnection | None = None
        self._give_up_at: float | None = None  # of a connection that is made for a message
        self._lock = threading.Lock()
        PUBLISHERS.add(self)
        forks.register(self)

    def __repr__(self) -> str:
        return f"<AmqpPublisher {self._endpoints}>"

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Return when the broker has confirmed every message.

        Raises PublishError, ConnectionLost when there is no broker, SettingsError when trying again cannot help.
        """
        check_sizes(messages, self._settings.fastq_max_message_bytes)
        with self._lock:
            connection = self._ready(deadline)
            try:
                if connection.blocked is not None and not connection.wait_unblocked():
                    raise blocked(connection)
                if len(messages) == 1:
                    confirms = self._publish_one(connection, messages[0])
                else:
                    confirms = self._publish_many(connection, messages)
            except BaseException:
                # Late confirms of these messages must not be taken for those of the next ones.
                self._drop()
                raise
            connection.used_at = time.monotonic()
            if confirms is not None:
                confirms.check()

    def _publish_one(self, connection: BlockingConnection, message: Message) -> AwaitedConfirms | None:
        """The hot path: one send, one recv, one comparison; None is the plain good answer."""
        if not message.exchange and message.routing_key not in connection.declared:
            self._declare_missing(connection, message.routing_key)
        data = publish_frames(CHANNEL, message, connection.frame_max, self._confirm and self.mandatory)
        if not self._confirm:
            self._write(connection, data)
            return None
        connection.published = tag = connection.published + 1
        try:
            if (sent := connection.send(data)) != len(data):
                connection.transmit(data[sent:])
            answer = connection.recv(4096)
        except (BlockingIOError, TimeoutError):
            raise not_confirmed(connection, 0, 1, 0) from None
        except (OSError, ValueError) as error:
            raise unknown_fate(lost(connection.url, error, "publishing")) from None
        except ConnectionLost as error:
            if error.timed_out:
                raise not_confirmed(connection, 0, 1, 0) from None
            raise unknown_fate(error) from None
        if answer == ACK_HEAD + tag.to_bytes(8, "big") + ACK_TAIL:
            return None
        return self._read_answer(connection, tag, message, answer)

    def _write(self, connection: BlockingConnection, data: bytes) -> None:
        """Hand one message to the kernel. Raises ConnectionLost: the broker takes no part of a message for a whole."""
        try:
            if (sent := connection.send(data)) != len(data):
                connection.transmit(data[sent:])
        except (OSError, ValueError) as error:
            raise lost(connection.url, error, "publishing") from None

    def _read_answer(
        self, connection: BlockingConnection, tag: int, message: Message, answer: bytes
    ) -> AwaitedConfirms:
        """Anything but a plain confirm: a returned message, a blocked connection, an error, or part of a frame."""
        if not answer:
            raise unknown_fate(ConnectionLost(f"RabbitMQ at {connection.url} closed the connection"))
        confirms = AwaitedConfirms(connection, (message,))
        confirms.expect_tags((tag,))
        try:
            connection.feed(answer)
            confirms.wait(0, connection.io_timeout_s)
        except ConnectionLost as error:
            raise unknown_fate(error) from None
        return confirms

    def _publish_many(self, connection: BlockingConnection, messages: Sequence[Message]) -> AwaitedConfirms:
        """Send in windows; while one is being confirmed the next is under way."""
        for queue in {message.routing_key for message in messages if not message.exchange} - connection.declared:
            self._declare_missing(connection, queue)
        confirms = AwaitedConfirms(connection, messages)
        try:
            for count, data in windows(messages, connection.frame_max, self._confirm):
                if self._confirm:
                    confirms.expect(count)
                connection.transmit(data)
                if self._confirm:
                    confirms.wait(WINDOW, connection.io_timeout_s)
            confirms.wait(0, connection.io_timeout_s)
        except ConnectionLost as error:
            if error.timed_out and self._confirm:
                raise confirms.late() from None
            raise unknown_fate(error, confirms.again() if self._confirm else None) from None
        return confirms

    def _declare_missing(self, connection: BlockingConnection, queue: str) -> None:
        """Create a queue before the first message goes to it on this connection, where the settings allow that."""
        if self._topology.may_create(queue):
            connection.declare(self._topology.spec(queue))
        else:
            connection.declared.add(queue)

    def _ready(self, deadline: float | None = None) -> BlockingConnection:
        """Return an open connection whose calls end about when the deadline is over. Call with the lock held."""
        now = time.monotonic()
        connection = self._connection
        if connection is None or not self._confirm or now - connection.used_at >= IDLE_CHECK_S:
            self._give_up_at = deadline
            try:
                connection = self._checked(connection)
            finally:
                self._give_up_at = None
            now = time.monotonic()
        connection.limit(self._timeout_s if deadline is None else deadline - now)
        return connection

    def _checked(self, connection: BlockingConnection | None) -> BlockingConnection:
        """Return this connection, which was idle, when nothing has ended it meanwhile; else a new one."""
        if connection is None:
            return self._connect()
        if not self._confirm and connection.is_quiet():
            return connection
        try:
            connection.refresh()
            for event in connection.take_events():
                connection.check_channel(event)
        except FastqError:
            self._drop()
            return self._connect()
        return connection

    def _connect(self) -> BlockingConnection:
        until = self._give_up_at
        self._connection = connection = connect_any(self._endpoints, self._settings, "producer", self._timeout_s, until)
        try:
            if until is not None:
                connection.limit(until - time.monotonic())
            connection.open_channel(CHANNEL)
            if self._confirm:
                connection.rpc(CHANNEL, "confirm.select")
        except BaseException:
            self._drop()
            raise
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _administer(self, operation: Callable[[BlockingConnection], T], deadline: float | None = None) -> T:
        """Do something on the channel that is not for publishing; a refusal leaves the connection in order."""
        with self._lock:
            connection = self._ready(deadline)
            try:
                return operation(connection)
            except SettingsError:
                raise
            except BaseException:
                self._drop()
                raise

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing. Raises SettingsError when it exists with other arguments."""
        self._administer(lambda connection: connection.declare(self._topology.spec(queue)), deadline)

    def purge(self, queue: str) -> int:
        """Drop the waiting messages of a queue and return how many there were. Raises SettingsError without a queue."""
        purged = self._administer(lambda connection: connection.rpc(ADMIN_CHANNEL, "queue.purge", queue=queue))
        return int(purged["message_count"])

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue. Raises SettingsError without such a queue."""
        fields = {"queue": queue, "passive": True}
        found = self._administer(lambda connection: connection.rpc(ADMIN_CHANNEL, "queue.declare", **fields))
        return int(found["message_count"])

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        with self._lock:
            self._drop()

    def after_fork(self) -> None:
        """In a forked child: leave the parent's connection alone; an own one is opened when it is needed."""
        self._lock = threading.Lock()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def close_at_exit(self) -> None:
        """Close unless a thread is still publishing."""
        if self._lock.acquire(timeout=0.2):
            self._drop()
            self._lock.release()


PUBLISHERS: weakref.WeakSet[AmqpPublisher] = weakref.WeakSet()


def close_connections() -> None:
    """At exit: without a goodbye the broker logs an error for each connection."""
    for publisher in list(PUBLISHERS):
        publisher.close_at_exit()


atexit.register(close_connections)
