"""Publishing to Redis from programs: over a blocking socket, from any thread, across forks. No loop.

Retries are the caller's: ConnectionLost says that nothing was sent, PublishError that the fate is bad or unknown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastq.brokers.limits import check_sizes
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.commands import (
    bind_commands,
    check,
    fanout_command,
    fanouts_of,
    push_command,
    refused,
    routed,
)
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost, PublishError, RedisError
from fastq.net import forks
from fastq.queues import Topology

if TYPE_CHECKING:
    from fastq.brokers.redis.login import Command
    from fastq.settings import Settings
    from fastq.wire.message import Message


class RedisPublisher:
    """Publishes from any thread, and in forked children. A publish returns when Redis has the messages."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._urls = parse_redis_url(url, settings)
        self._topology = Topology(settings)
        self._fanouts = fanouts_of(settings, self._topology)
        self._layout = read_layout(settings, self._urls[0].db)
        self._max_message_bytes = settings.fastq_max_message_bytes
        self._timeout_s = settings.fastq_publish_timeout
        self._redis = self._redis_of(settings)
        self._lock = threading.Lock()
        forks.register(self)

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Store the messages, all in one write.

        Raises ConnectionLost when nothing was sent, PublishError when Redis refused or the fate is unknown.
        """
        check_sizes(messages, self._max_message_bytes)
        with self._lock:
            self._open_by(deadline)
            try:
                if len(messages) == 1 and not messages[0].exchange:
                    self._redis.expect(self._redis.ask(push_command(self._layout, messages[0])), int)
                else:
                    self._publish_many(messages)
            except ConnectionLost as error:
                raise unknown_fate(error) from None
            except RedisError as error:
                raise refused(error) from None

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Let exchanges know the queue; the queue itself is there as soon as it holds a message."""
        with self._lock:
            self._open_by(deadline)
            check(self._redis.pipeline(bind_commands(self._layout, self._topology.spec(queue))))

    def purge(self, queue: str) -> int:
        """Drop the messages that wait in a queue, also those for their time, and return how many there were."""
        counts, lists = self._counts(queue), self._layout.lists_of(queue)
        places = [*lists, *map(self._layout.delayed_of, lists)]
        with self._lock:
            # Counted and dropped in one step: what comes in between must not be lost uncounted.
            commands: list[Command] = [("MULTI",), *counts, ("DEL", *places), ("EXEC",)]
            replies = check(self._redis.pipeline(commands))
            found = self._redis.expect(check(self._redis.expect(replies[-1], list)), [int] * (len(counts) + 1))
        return sum(found[: len(counts)])

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, those included that wait there for their time."""
        with self._lock:
            return sum(self._redis.expect(check(self._redis.pipeline(self._counts(queue))), [int, ...]))

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        with self._lock:
            self._redis.close()

    def after_fork(self) -> None:
        """In a forked child: a thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def _open_by(self, deadline: float | None) -> None:
        """Have a connection whose replies are waited for until about the deadline. Call with the lock held."""
        self._redis.open(time.monotonic() + self._timeout_s if deadline is None else deadline)

    def _redis_of(self, settings: Settings) -> BlockingRedis:
        timeout_s, connect_s = settings.fastq_publish_timeout, settings.broker_connection_timeout
        connect_s = min(timeout_s, connect_s)
        return BlockingRedis(self._urls, timeout_s, "fastq-producer", connect_s, self._max_message_bytes)

    def _counts(self, queue: str) -> list[Command]:
        lists = self._layout.lists_of(queue)
        return [*(("LLEN", each) for each in lists), *(("ZCARD", self._layout.delayed_of(each)) for each in lists)]

    def _publish_many(self, messages: Sequence[Message]) -> None:
        # Everything is encoded before anything is sent.
        commands: list[Command] = []
        for message in messages:
            if message.exchange:
                commands += self._through_exchange(message)
            else:
                commands.append(push_command(self._layout, message))
        self._redis.expect(check(self._redis.pipeline(commands)), [int, ...])

    def _through_exchange(self, message: Message) -> list[Command]:
        if message.exchange in self._fanouts:
            return [fanout_command(self._layout, message)]
        members = self._redis.call("SMEMBERS", self._layout.bindings_of(message.exchange))
        return routed(self._layout, message, self._redis.expect(members, [bytes, ...]))


def unknown_fate(error: ConnectionLost) -> PublishError:
    """Return the error for commands without an answer: after a time-out they may still be carried out."""
    if error.timed_out:
        text = f"{error}; what was just sent may still be stored, so it is not sent again"
        return PublishError(f"{text}. Raise fastq_publish_timeout if the server is only slow", again=())
    return PublishError(f"{error}; what was just sent may or may not have been stored")
