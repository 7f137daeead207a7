"""Publishing to RabbitMQ from an event loop: confirmed, any number of callers on one connection. Retries are theirs."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fastq.brokers.on_loop import Line, LoopPublisher, Wait, in_time
from fastq.brokers.rabbitmq.aio import AmqpConnection
from fastq.brokers.rabbitmq.confirms import (
    BASIC_ACK,
    BASIC_NACK,
    CHANNEL,
    WINDOW,
    Confirms,
    blocked,
    read_confirm,
    unknown_fate,
    windows,
)
from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.brokers.rabbitmq.url import AmqpUrl, Endpoints
from fastq.errors import ConnectionLost, FastqError, PublishError
from fastq.net.tcp import none_reachable
from fastq.queues import Topology
from fastq.wire.frames import publish_frames

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message


_CONFIRMS = (BASIC_ACK, BASIC_NACK)


class AmqpWait(Wait):
    """Somebody whose messages are to be confirmed, all but so many."""

    __slots__ = ("confirms", "left", "seen")

    def __init__(self, messages: Sequence[Message], answered: asyncio.Future[None], confirms: Confirms) -> None:
        super().__init__(messages, answered)
        self.confirms = confirms
        self.left = 0
        self.seen = len(messages)  # how many were not confirmed when the time was looked at last

    @property
    def unconfirmed(self) -> int:
        """How many messages are not confirmed, those included that are not sent."""
        return len(self.messages) - self.confirms.sent + len(self.confirms.due)

    def settle(self, tag: int, is_stored: bool) -> None:
        """Count the confirm of a message."""
        self.confirms.settle(tag, is_stored)
        if len(self.confirms.due) <= self.left and not self.answered.done():
            self.answered.set_result(None)


class AmqpLine(Line[AmqpWait]):
    """One connection to RabbitMQ that is published on."""

    def __init__(self, connection: AmqpConnection, topology: Topology) -> None:
        super().__init__()
        self.published = 0
        self.declared: set[str] = set()
        self._connection = connection
        self._link = connection.link
        self._topology = topology
        self._under_way: dict[int, AmqpWait] = {}  # by tag, in the order of sending
        self._out: list[bytes] = []
        self._declaring: dict[str, asyncio.Task[None]] = {}
        self._unblocked: asyncio.Future[None] | None = None

    async def open(self, timeout_s: float) -> None:
        """Connect and have what is published confirmed. Raises ConnectionLost (try again) or SettingsError (do not)."""
        connection = self._connection
        await connection.open(timeout_s)
        connection.lost.add_done_callback(self.on_lost)
        try:
            await connection.rpc(CHANNEL, "confirm.select")
        except BaseException:
            await connection.close()
            raise
        if self._link.on_method is not None:
            self._pass_on, self._link.on_method = self._link.on_method, self._on_method
            self._link.on_returned = self._on_returned

    @property
    def url(self) -> AmqpUrl:
        """The broker."""
        return self._connection.url

    @property
    def blocked(self) -> str | None:
        """Why the broker takes no messages, None when it does."""
        return self._connection.blocked

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self._connection.lost.done()

    async def publish(self, messages: Sequence[Message], until: float) -> None:
        """Return when the broker has confirmed the messages."""
        if self.blocked is not None:
            await self._wait_unblocked(until)
        for queue in {message.routing_key for message in messages if not message.exchange} - self.declared:
            if self._topology.may_create(queue):
                await self.declare(queue, until)
            else:
                self.declared.add(queue)
        if self.is_lost:
            raise ConnectionLost(str(self._connection.lost.result()))
        wait = AmqpWait(messages, self._loop.create_future(), Confirms(self, messages))
        if len(messages) == 1:
            self._send(wait, 1, publish_frames(CHANNEL, messages[0], self._link.frame_max, True))
            await self.wait(wait, until)
        else:
            await self._publish_many(wait, until)
        wait.confirms.check()

    async def _publish_many(self, wait: AmqpWait, until: float) -> None:
        """Send in windows; while one is being confirmed the next is under way."""
        span_s, confirms = until - time.monotonic(), wait.confirms
        for count, data in windows(wait.messages, self._link.frame_max, True):
            if self.is_lost:
                raise unknown_fate(ConnectionLost(str(self._connection.lost.result())), confirms.again())
            self._send(wait, count, data)
            wait.left = 0 if confirms.sent == len(wait.messages) else WINDOW
            if len(confirms.due) > wait.left:
                wait.answered = self._loop.create_future()
                await self.wait(wait, time.monotonic() + span_s)

    def _send(self, wait: AmqpWait, count: int, data: bytes) -> None:
        under_way = self._under_way
        is_alone = not under_way
        for tag in wait.confirms.expect(count):
            under_way[tag] = wait
        # Messages of one turn of the loop go out together; the first need not wait for others.
        if is_alone:
            self._link.write(data)
        else:
            if not self._out:
                self._loop.call_soon(self._flush)
            self._out.append(data)

    def _flush(self) -> None:
        out, self._out = self._out, []
        self._link.write(b"".join(out))

    async def declare(self, queue: str, until: float) -> None:
        """Create a queue if it is missing, once for all who ask. Raises SettingsError when it has other arguments."""
        declaring = self._declaring.get(queue)
        if declaring is None:
            declaring = self._declaring[queue] = self._loop.create_task(self._declare(queue))
            declaring.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be waiting
        try:
            await in_time(declaring, until, f"RabbitMQ at {self.url} did not declare queue {queue!r}")
        except ConnectionLost:
            self.is_doubtful = True
            self._leave()
            raise

    async def _declare(self, queue: str) -> None:
        try:
            await self._connection.declare(self._topology.spec(queue))
            self.declared.add(queue)
        finally:
            self._declaring.pop(queue, None)

    async def close(self) -> None:
        """Say goodbye and close."""
        await self._connection.close()

    # --- answers

    def _on_method(self, channel: int, method_id: int, arguments: bytes) -> None:
        if channel == CHANNEL and method_id in _CONFIRMS:
            tag, is_multiple = read_confirm(method_id, arguments)
            self._on_confirm(tag, is_multiple, method_id == BASIC_ACK)
            return
        self._pass_on(channel, method_id, arguments)
        if channel == 0 and self._unblocked is not None and self.blocked is None:
            unblocked, self._unblocked = self._unblocked, None
            unblocked.set_result(None)

    def _on_confirm(self, tag: int, is_multiple: bool, is_stored: bool) -> None:
        under_way = self._under_way
        if not is_multiple:
            wait = under_way.pop(tag, None)
            if wait is not None:
                wait.settle(tag, is_stored)
            return
        done: list[int] = []
        for each in under_way:
            if each > tag:
                break
            done.append(each)
        for each in done:
            under_way.pop(each).settle(each, is_stored)

    def _on_returned(self, returned: dict[str, bytes]) -> None:
        props = returned["props"]
        for wait in set(self._under_way.values()):
            if any(message.props == props for message in wait.messages):
                wait.confirms.give_back(returned["arguments"], props)

    async def _wait_unblocked(self, until: float) -> None:
        while self.blocked is not None and not self.is_lost:
            if self._unblocked is None:
                self._unblocked = self._loop.create_future()
            done, _ = await asyncio.wait([self._unblocked], timeout=max(until - time.monotonic(), 0.0))
            if not done:
                raise blocked(self)

    # --- the end of a wait

    def is_late(self, wait: AmqpWait) -> PublishError | None:
        """Return the error for confirms that did not come in time."""
        seen, wait.seen = wait.seen, wait.unconfirmed
        return wait.confirms.late() if wait.seen == seen else None

    def on_lost(self, lost: asyncio.Future[Exception]) -> None:
        """The connection has ended: tell all who wait."""
        if self._unblocked is not None and not self._unblocked.done():
            self._unblocked.set_result(None)
        super().on_lost(lost)

    def lost_error(self, wait: AmqpWait, error: Exception) -> FastqError:
        """Return what a wait ends with: the broker's reason where it is about its messages."""
        if not isinstance(error, ConnectionLost) and self._is_meant(wait, error):
            return cast("FastqError", copy.copy(error))
        again = wait.confirms.again() if len(wait.messages) > 1 else None
        return unknown_fate(ConnectionLost(str(error)), again)

    def _is_meant(self, wait: AmqpWait, error: Exception) -> bool:
        """Whether the broker has closed the channel because of this wait's messages: it does not say which it was."""

        def is_named(each: AmqpWait) -> bool:
            return any(message.exchange and f"'{message.exchange}'" in str(error) for message in each.messages)

        def size(each: AmqpWait) -> int:
            return max(len(message.body) for message in each.messages)

        if any(map(is_named, self._waits)):
            return is_named(wait)
        return "size" not in str(error) or size(wait) == max(map(size, self._waits))


class AmqpLoopPublisher(LoopPublisher):
    """AsyncPublisher for amqp:// and amqps://. It waits for the confirm whatever ``confirm_publish`` says."""

    def __init__(self, url: str | Sequence[str], settings: Settings) -> None:
        self._endpoints = Endpoints(url, settings)
        self._settings = settings
        self._topology = Topology(settings)
        super().__init__(self._open, self._endpoints, settings)

    async def _open(self) -> AmqpLine:
        failures: list[ConnectionLost] = []
        for url in self._endpoints:
            try:
                return await open_line(url, self._settings, self._topology, "producer")
            except ConnectionLost as error:
                failures.append(error)
        raise none_reachable(failures)


async def open_line(url: AmqpUrl, settings: Settings, topology: Topology, purpose: str) -> AmqpLine:
    """Return a new connection to one broker. Raises ConnectionLost (try again) or SettingsError (do not)."""
    heartbeat_s = settings.broker_heartbeat if url.heartbeat_s is None else url.heartbeat_s
    line = AmqpLine(AmqpConnection(url, AmqpLink(None), heartbeat_s, purpose), topology)
    await line.open(settings.broker_connection_timeout)
    return line
