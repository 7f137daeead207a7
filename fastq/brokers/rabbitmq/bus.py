"""Remote control and events on RabbitMQ: exchanges and queues as Celery declares them. What is said is not known here.

Source: kombu's pidbox and event exchange as seen on the wire.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.rabbitmq.aio import ADMIN_CHANNEL, CHANNEL, AmqpConnection
from fastq.brokers.rabbitmq.connection import BlockingConnection, Event, connect_any
from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.brokers.rabbitmq.url import Endpoints
from fastq.bus import LosableBus
from fastq.bus.pidbox import MAX_REQUEST_BYTES, Mailbox, Request, decode_headers, encode_headers
from fastq.errors import ConnectionLost, SettingsError
from fastq.net.tcp import none_reachable
from fastq.wire.amqp import METHODS
from fastq.wire.frames import publish_frames
from fastq.wire.ids import new_id
from fastq.wire.message import Message

if TYPE_CHECKING:
    from fastq.interfaces import Clock, OnRequest, Reply
    from fastq.settings import Settings

logger = logging.getLogger("fastq.transport.amqp_bus")

REPLY_CHANNEL: Final = 3  # of the worker's connection: replies to what the worker itself has asked
_DELIVER: Final = METHODS["basic.deliver"]
#: Replies to ``hello`` hold every revoked id: fifty thousand of them.
_MAX_MESSAGE_BYTES: Final = 16 * MAX_REQUEST_BYTES

_MAX_UNSENT_BYTES: Final = 4 * 1024 * 1024  # chosen

#: A method of a declaration and its fields; ``<method>-ok`` answers each.
Step = tuple[str, dict[str, Any]]
OnMessage = Callable[[Mapping[str, Any], bytes], None]


class AmqpBus(LosableBus):
    """The worker's side."""

    def __init__(self, url: str, settings: Settings, clock: Clock) -> None:
        super().__init__()
        self._settings = settings
        self._clock = clock
        self._mailbox = Mailbox(settings)
        self._endpoints = Endpoints(url, settings)
        self._connection: AmqpConnection | None = None
        self._listeners: dict[int, OnMessage] = {}  # by channel

    async def open(self, hostname: str, on_request: OnRequest | None) -> None:
        """Connect to the first broker that takes a connection, declare, listen."""
        failures: list[ConnectionLost] = []
        for url in self._endpoints:
            connection = AmqpConnection(url, AmqpLink(None), self._settings.broker_heartbeat, "control")
            connection.link.max_message_bytes = _MAX_MESSAGE_BYTES
            try:
                await connection.open(self._settings.broker_connection_timeout)
                self._route(connection)
                await self._declare(connection, hostname, on_request)
            except ConnectionLost as error:
                failures.append(error)
                await connection.close()
            except BaseException:
                await connection.close()
                raise
            else:
                self._connection = connection
                connection.lost.add_done_callback(self._on_lost)
                return
        raise none_reachable(failures)

    async def _declare(self, connection: AmqpConnection, hostname: str, on_request: OnRequest | None) -> None:
        await connection.open_channel(CHANNEL)
        for method, fields in exchange_steps(self._mailbox):
            await connection.rpc(ADMIN_CHANNEL, method, **fields)
        method, fields = event_exchange_step(self._settings)
        try:
            await connection.rpc(ADMIN_CHANNEL, method, **fields)
        except SettingsError as error:
            # It exists in another form: then it is somebody else's, and good enough to publish to.
            logger.warning("events: %s", error)
        if on_request is None:
            return
        self._listeners[CHANNEL] = on_request
        queue = await self._own_queue(connection, hostname)
        await connection.rpc(CHANNEL, "basic.consume", queue=queue, no_ack=True)

    async def _own_queue(self, connection: AmqpConnection, hostname: str) -> str:
        """Declare the node's queue, or one of another name where a worker of the same name has that one; return it."""
        queue = self._mailbox.node_queue(hostname)
        declare, bind = node_steps(self._mailbox, queue)
        try:
            found = await connection.rpc(ADMIN_CHANNEL, declare[0], **declare[1])
            is_taken = found["consumer_count"] > 0
        except SettingsError as error:
            logger.debug("remote control: %s", error)
            is_taken = True
        if is_taken:
            # Requests come to every queue; which node they are for is in them. Two on one queue would take turns.
            queue = self._mailbox.node_queue(f"{hostname}.{new_id()}")
            declare, bind = node_steps(self._mailbox, queue)
            fields = {**declare[1], "exclusive": True, "durable": False, "auto_delete": True}
            await connection.rpc(ADMIN_CHANNEL, declare[0], **fields)
        await connection.rpc(ADMIN_CHANNEL, bind[0], **bind[1])
        return queue

    def _route(self, connection: AmqpConnection) -> None:
        """Give deliveries to who listens on their channel, and leave every other method to the connection."""
        others = connection.link.on_method

        def on_method(channel: int, method_id: int, arguments: Any) -> None:
            if method_id != _DELIVER:
                if others is not None:
                    others(channel, method_id, arguments)
                return
            listener = self._listeners.get(channel)
            if listener is not None:
                _, props, body = arguments
                listener(decode_headers(props), body)

        connection.link.on_method = on_method

    # --- sending

    def reply(self, exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Publish a reply; one that the broker cannot take now is dropped: nobody waits that long."""
        codec = self._mailbox.codec
        try:
            self._publish(exchange, routing_key, headers, body, codec.content_type, codec.content_encoding)
        except ConnectionLost:
            self.dropped += 1

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Publish an event, which is JSON."""
        exchange = self._settings.event_exchange
        self._publish(exchange, routing_key, headers, body, "application/json", "utf-8")

    def _publish(
        self, exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes, kind: str, encoding: str
    ) -> None:
        connection = self._connection
        if connection is None or connection.lost.done():
            raise ConnectionLost("remote control and events are not connected")
        if connection.blocked is not None or connection.link.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            # What is written now would only fill our memory.
            raise ConnectionLost(f"RabbitMQ at {connection.url} takes no messages now")
        message = Message(exchange, routing_key, encode_headers(headers, kind, encoding), body)
        connection.link.write(publish_frames(CHANNEL, message, connection.link.frame_max))

    # --- asking

    async def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float) -> list[Reply]:
        """Broadcast a request and return what comes in time."""
        connection = self._connection
        if connection is None:
            raise ConnectionLost("remote control is not connected")
        request = Request(method, arguments, ticket=new_id(), reply_to=new_id())
        replies: list[Reply] = []

        def on_reply(headers: Mapping[str, Any], body: bytes) -> None:
            replies.extend(self._mailbox.decode_replies(headers, body, request.ticket))

        self._listeners[REPLY_CHANNEL] = on_reply
        queue = self._mailbox.reply_queue(request.reply_to)
        try:
            for step, fields in reply_steps(self._mailbox, request.reply_to):
                await connection.rpc(ADMIN_CHANNEL, step, **fields)
            await connection.rpc(REPLY_CHANNEL, "basic.consume", queue=queue, consumer_tag=queue[:255], no_ack=True)
            headers = {"clock": self._clock.forward(), "expires": time.time() + timeout_s}
            body, codec = self._mailbox.encode_request(request), self._mailbox.codec
            self._publish(self._mailbox.requests, "", headers, body, codec.content_type, codec.content_encoding)
            await asyncio.wait([connection.lost], timeout=timeout_s)
            if connection.lost.done():
                raise ConnectionLost(str(connection.lost.result()))
            # The queue goes with its only consumer.
            await connection.rpc(REPLY_CHANNEL, "basic.cancel", consumer_tag=queue[:255])
        finally:
            del self._listeners[REPLY_CHANNEL]
        return replies

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.close()
        self._lose(ConnectionLost("remote control and events were closed"))


class BlockingAmqpBus:
    """The client's side."""

    CHANNEL = 1

    def __init__(self, url: str, settings: Settings) -> None:
        self._settings = settings
        self._mailbox = Mailbox(settings)
        self._endpoints = Endpoints(url, settings)
        self._connection: BlockingConnection | None = None
        self._events_on: BlockingConnection | None = None  # where the exchange of events was declared

    def ask(
        self,
        method: str,
        arguments: Mapping[str, Any],
        timeout_s: float,
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> Iterator[Reply]:
        """Broadcast a request and yield the replies as they come."""
        request = Request(method, arguments, destination, pattern, matcher, new_id(), new_id())
        connection = self._connect()
        for step, fields in reply_steps(self._mailbox, request.reply_to):
            connection.rpc(self.CHANNEL, step, **fields)
        queue = self._mailbox.reply_queue(request.reply_to)
        connection.rpc(self.CHANNEL, "basic.consume", queue=queue, consumer_tag=queue[:255], no_ack=True)
        self._send(request, time.time() + timeout_s)
        yield from self._collect(request, time.monotonic() + timeout_s)
        connection.rpc(self.CHANNEL, "basic.cancel", consumer_tag=queue[:255])

    def _collect(self, request: Request, deadline: float) -> Iterator[Reply]:
        connection = self._connect()
        missing = set(request.destination)
        while event := connection.next_event(deadline):
            connection.check_channel(event)
            for node, reply in self._replies_in(event, request.ticket):
                yield node, reply
                missing.discard(node)
            if request.destination and not missing:
                return

    def _replies_in(self, event: Event, ticket: str) -> list[Reply]:
        if event.method_id != _DELIVER:
            return []
        return self._mailbox.decode_replies(decode_headers(event.props), event.body, ticket)

    def tell(
        self,
        method: str,
        arguments: Mapping[str, Any],
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> None:
        """Broadcast a request without an address for replies."""
        connection = self._connect()
        for step, fields in exchange_steps(self._mailbox):
            connection.rpc(self.CHANNEL, step, **fields)
        self._send(Request(method, arguments, destination, pattern, matcher), 0)

    def _send(self, request: Request, expires: float) -> None:
        connection, codec = self._connect(), self._mailbox.codec
        headers = {"clock": 0, "expires": expires}
        props = encode_headers(headers, codec.content_type, codec.content_encoding)
        message = Message(self._mailbox.requests, "", props, self._mailbox.encode_request(request))
        connection.transmit(publish_frames(self.CHANNEL, message, connection.frame_max))

    def events(self) -> Iterator[tuple[Mapping[str, Any], bytes]]:
        """Bind a queue of our own to every event and return what arrives in it."""
        connection = self._connect()
        queue = f"{self._settings.event_queue_prefix}.{new_id()}"
        for step, fields in event_steps(self._settings, queue):
            connection.rpc(self.CHANNEL, step, **fields)
        connection.rpc(self.CHANNEL, "basic.consume", queue=queue, no_ack=True)
        return self._arriving(connection)

    def _arriving(self, connection: BlockingConnection) -> Iterator[tuple[Mapping[str, Any], bytes]]:
        while True:
            event = connection.next_event(time.monotonic() + 60)
            if event is None:
                continue
            connection.check_channel(event)
            if event.method_id == _DELIVER:
                yield decode_headers(event.props), event.body

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Publish an event, which is JSON."""
        connection = self._connect()
        connection.refresh()
        for event in connection.take_events():
            connection.check_channel(event)
        if self._events_on is not connection:
            step, fields = event_exchange_step(self._settings)
            connection.rpc(self.CHANNEL, step, **fields)
            self._events_on = connection
        props = encode_headers(headers, "application/json", "utf-8")
        message = Message(self._settings.event_exchange, routing_key, props, body)
        connection.transmit(publish_frames(self.CHANNEL, message, connection.frame_max))

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connect(self) -> BlockingConnection:
        if self._connection is None:
            timeout_s = self._settings.broker_connection_timeout
            self._connection = connect_any(self._endpoints, self._settings, "control", timeout_s)
        return self._connection


def open_bus(url: str, settings: Settings, clock: Clock) -> AmqpBus:
    """Return the worker's side."""
    return AmqpBus(url, settings, clock)


def open_blocking_bus(url: str, settings: Settings) -> BlockingAmqpBus:
    """Return the client's side."""
    return BlockingAmqpBus(url, settings)


# --- what is declared


def exchange_steps(mailbox: Mailbox) -> Iterator[Step]:
    """Yield what makes the exchanges that requests and replies go through."""
    yield "exchange.declare", {"exchange": mailbox.requests, "type": "fanout"}
    yield "exchange.declare", {"exchange": mailbox.replies, "type": "direct"}


def node_steps(mailbox: Mailbox, queue: str) -> Iterator[Step]:
    """Yield what makes a worker's queue."""
    yield "queue.declare", _control_queue(mailbox, queue)
    yield "queue.bind", {"queue": queue, "exchange": mailbox.requests, "routing_key": ""}


def reply_steps(mailbox: Mailbox, address: str) -> Iterator[Step]:
    """Yield what makes the queue in which the replies to an address arrive."""
    yield from exchange_steps(mailbox)
    queue = mailbox.reply_queue(address)
    yield "queue.declare", _control_queue(mailbox, queue)
    yield "queue.bind", {"queue": queue, "exchange": mailbox.replies, "routing_key": address}


def event_exchange_step(settings: Settings) -> Step:
    """Return what makes the exchange of events."""
    return "exchange.declare", {"exchange": settings.event_exchange, "type": "topic", "durable": True}


def event_steps(settings: Settings, queue: str) -> Iterator[Step]:
    """Yield what makes a monitor's queue, with every event in it."""
    yield event_exchange_step(settings)
    exclusive, durable = settings.event_queue_exclusive, settings.event_queue_durable
    yield "queue.declare", _queue(queue, exclusive, durable, settings.event_queue_expires, settings.event_queue_ttl)
    yield "queue.bind", {"queue": queue, "exchange": settings.event_exchange, "routing_key": "#"}


def _control_queue(mailbox: Mailbox, name: str) -> dict[str, Any]:
    return _queue(name, mailbox.exclusive, mailbox.durable, mailbox.expires_s, mailbox.ttl_s)


def _queue(name: str, exclusive: bool, durable: bool, expires_s: float | None, ttl_s: float | None) -> dict[str, Any]:
    limits = {"x-expires": expires_s, "x-message-ttl": ttl_s}
    arguments = {key: int(value * 1000) for key, value in limits.items() if value is not None}
    return {
        "queue": name,
        "exclusive": exclusive,
        "durable": durable,
        "auto_delete": not durable,
        "arguments": arguments,
    }
