"""Publishing to RabbitMQ with the confirm collected behind the caller's back: ``confirm_publish="behind"``.

A publish returns once the message is with the kernel. Each message is kept until the broker has confirmed it, and sent
again on a new connection when the old one is lost, not when the broker is slow to confirm or to read, so a crash of the
broker or of the connection loses nothing; only a crash of this process in that moment can. What the broker refuses is
logged, as nobody waits for it any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from fastq.brokers.limits import check_sizes
from fastq.brokers.rabbitmq.confirms import (
    BASIC_ACK,
    BASIC_NACK,
    BASIC_RETURN,
    CHANNEL,
    WINDOW,
    blocked,
    read_confirm,
)
from fastq.brokers.rabbitmq.connection import BlockingConnection
from fastq.brokers.rabbitmq.publisher import AmqpPublisher
from fastq.brokers.rabbitmq.tcp import lost
from fastq.brokers.watcher import LOOK_EVERY_S, Watcher
from fastq.errors import ConnectionLost, FastqError, PublishError
from fastq.wire.amqp import decode_method
from fastq.wire.frames import publish_frames

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

logger = logging.getLogger("fastq.transport.amqp_behind")

COLLECT_EVERY = 64  # messages between two looks at what has been confirmed, while they follow each other


class BehindPublisher(AmqpPublisher):
    """An AmqpPublisher that does not wait for confirms but for room: at most WINDOW messages are unconfirmed."""

    def __init__(self, url: str | Sequence[str], settings: Settings) -> None:
        super().__init__(url, settings)
        self._unconfirmed: dict[int, Message] = {}  # by delivery tag, in the order of sending
        self._unsent = b""  # what the socket has not taken yet
        self._uncollected = 0
        self._oldest_at = 0.0
        self._warned_at = 0.0
        self._watcher = Watcher(self._look, "fastq-confirms")

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Return when the messages are on their way; errors of the connection are raised, later ones are logged.

        PublishError when there is no room in time, and when the socket does not take all: then they may still arrive.
        """
        check_sizes(messages, self._settings.fastq_max_message_bytes)
        with self._lock:
            self._uncollected += len(messages)
            if self._uncollected >= COLLECT_EVERY:
                self._collect()
            self._give_up_at = deadline
            try:
                self._send(messages)
            except FastqError:
                # The caller hears of these: they are its own to send again.
                told = {id(message) for message in messages}
                self._unconfirmed = {tag: kept for tag, kept in self._unconfirmed.items() if id(kept) not in told}
                raise
            finally:
                self._give_up_at = None
                if not self._watcher.is_awake:
                    self._watcher.wake()

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait until everything is confirmed and return how many messages are not, 0 when all is well."""
        with self._lock:
            self._settle(0, self._timeout_s if timeout_s is None else timeout_s)
            return len(self._unconfirmed)

    def close(self) -> None:
        """Wait for the confirms, at most ``fastq_publish_timeout``, and close the connection."""
        left = self.flush()
        if left:
            logger.error("closed with %d unconfirmed message(s) to %r: %s", left, self, self._some_ids())
        super().close()

    def close_at_exit(self) -> None:
        """Close unless a thread is still publishing."""
        if self._lock.acquire(timeout=0.2):
            self._lock.release()
            self.close()

    def after_fork(self) -> None:
        """In a forked child: the parent keeps what it has sent."""
        super().after_fork()
        self._unconfirmed = {}
        self._unsent = b""
        self._uncollected = 0
        self._watcher.after_fork()

    # --- with the lock held

    def _drop(self) -> None:
        self._unsent = b""
        super()._drop()

    def _send(self, messages: Sequence[Message]) -> None:
        if self._unsent or len(self._unconfirmed) >= WINDOW:
            self._make_room()
        connection = self._connection or self._reconnect()
        if connection.blocked is not None and not connection.wait_unblocked(self._timeout_s):
            raise blocked(connection)
        for message in messages:
            if not message.exchange and message.routing_key not in connection.declared:
                self._declare_missing(connection, message.routing_key)
        self._enter(connection, messages)
        try:
            self._write_unsent(connection)
        except ConnectionLost as error:
            logger.warning("%s; what is not confirmed is sent again", error)
            self._drop()
            connection = self._reconnect()
        if self._unsent:
            raise PublishError(
                f"RabbitMQ at {connection.url} has not taken {len(messages)} message(s) within {self._timeout_s:g} s "
                "(fastq_publish_timeout); they may still be stored",
                again=(),
            )

    def _make_room(self) -> None:
        """Wait for room behind what is under way. Raises PublishError: nothing of the new messages was sent."""
        until = self._give_up_at
        wait_s = self._timeout_s if until is None else min(self._timeout_s, until - time.monotonic())
        self._settle(WINDOW // 2, wait_s)
        if self._unsent or len(self._unconfirmed) >= WINDOW:
            raise PublishError(
                f"not published: RabbitMQ has not confirmed {len(self._unconfirmed)} message(s) that were sent before, "
                f"for {max(0.0, wait_s):.3g} s; those may still be stored"
            )

    def _enter(self, connection: BlockingConnection, messages: Sequence[Message]) -> None:
        """Put messages behind what is to be written."""
        if len(messages) == 1:
            frames = publish_frames(CHANNEL, messages[0], connection.frame_max, True)
        else:
            frames = b"".join([publish_frames(CHANNEL, message, connection.frame_max, True) for message in messages])
        if not self._unconfirmed:
            self._oldest_at = time.monotonic()
        for tag, message in enumerate(messages, connection.published + 1):
            self._unconfirmed[tag] = message
        connection.published += len(messages)
        self._unsent += frames

    def _write_unsent(self, connection: BlockingConnection) -> None:
        """Write what is to be written; what the socket does not take in time stays. Raises ConnectionLost."""
        try:
            while self._unsent:
                self._unsent = self._unsent[connection.send(self._unsent) :]
        except (TimeoutError, BlockingIOError):
            return
        except (OSError, ValueError) as error:
            raise lost(connection.url, error, "publishing") from None

    def _reconnect(self) -> BlockingConnection:
        """Open a connection and send everything again that is not confirmed."""
        connection = self._connect()
        again, self._unconfirmed = list(self._unconfirmed.values()), {}
        if again:
            for queue in {message.routing_key for message in again if not message.exchange}:
                self._declare_missing(connection, queue)
            self._enter(connection, again)
            self._write_unsent(connection)
        return connection

    def _collect(self) -> None:
        """Take the confirms that have come; never waits."""
        self._uncollected = 0
        connection = self._connection
        if connection is None:
            return
        try:
            self._write_unsent(connection)
            connection.refresh()
            for event in connection.take_events():
                self._take(connection, event.method_id, event.arguments)
        except FastqError as error:
            logger.warning("%s; what is not confirmed is sent again", error)
            self._drop()

    def _settle(self, left: int, timeout_s: float) -> None:
        """Wait until at most ``left`` messages are unconfirmed, through reconnects, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while (self._unsent or len(self._unconfirmed) > left) and time.monotonic() < deadline:
            try:
                connection = self._connection or self._reconnect()
                self._write_unsent(connection)
                event = connection.next_event(min(deadline, time.monotonic() + LOOK_EVERY_S))
                if event is not None:
                    self._take(connection, event.method_id, event.arguments)
            except FastqError as error:
                logger.warning("%s; what is not confirmed is sent again", error)
                self._drop()
                time.sleep(min(LOOK_EVERY_S, max(0.0, deadline - time.monotonic())))

    def _take(self, connection: BlockingConnection, method_id: int, arguments: bytes) -> None:
        if method_id in (BASIC_ACK, BASIC_NACK):
            tag, is_multiple = read_confirm(method_id, arguments)
            # In the order of their tags: the first that is greater ends the search.
            done = list(takewhile(tag.__ge__, self._unconfirmed)) if is_multiple else [tag]
            for each in done:
                message = self._unconfirmed.pop(each, None)
                if message is not None and method_id == BASIC_NACK:
                    logger.error(
                        "RabbitMQ at %s refused task %s: its queue is full or has failed", connection.url, message.id
                    )
            self._oldest_at = time.monotonic()
        elif method_id == BASIC_RETURN:
            _, fields = decode_method(method_id, arguments)
            connection.declared.discard(fields["routing_key"])
            logger.error(
                "RabbitMQ at %s has no queue %r: a message to it is lost", connection.url, fields["routing_key"]
            )

    def _some_ids(self) -> str:
        return ", ".join(message.id for message in list(self._unconfirmed.values())[:5])

    def _look(self) -> bool:
        """Take confirms and mend the connection; False when nothing is unconfirmed."""
        with self._lock:
            self._collect()
            if self._connection is None and self._unconfirmed:
                try:
                    self._reconnect()
                except FastqError as error:
                    logger.warning("%d message(s) wait for a connection: %s", len(self._unconfirmed), error)
            elif self._unconfirmed and time.monotonic() - max(self._oldest_at, self._warned_at) > self._timeout_s:
                # Only slow: what it has would be stored twice. A peer that is gone is found by TCP.
                self._warned_at = time.monotonic()
                silence_s = self._warned_at - self._oldest_at
                logger.warning(
                    "RabbitMQ has confirmed none of %d message(s) for %.0f s; still waiting",
                    len(self._unconfirmed),
                    silence_s,
                )
            return bool(self._unconfirmed)
