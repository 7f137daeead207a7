"""Remote control and events on Redis, with kombu's channels and keys. What is said is not known here.

Requests and events are published on channels; replies are pushed onto a list that only their asker reads. A connection
that listens to channels takes no other commands, hence two of them on either side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.redis.aio import AsyncRedis
from fastq.brokers.redis.blocking import BlockingRedis
from fastq.brokers.redis.layout import Layout, read_layout
from fastq.brokers.redis.url import parse_redis_url
from fastq.bus import LosableBus
from fastq.bus.pidbox import Mailbox, Request, decode_headers, encode_headers
from fastq.errors import ConnectionLost, DecodeError, RedisError
from fastq.wire.ids import new_id
from fastq.wire.kombu import decode_envelope, encode_envelope

if TYPE_CHECKING:
    from fastq.brokers.redis.login import Command
    from fastq.interfaces import Clock, OnRequest, Reply
    from fastq.settings import Settings

logger = logging.getLogger("fastq.transport.redis_bus")

#: Chosen: replies that nobody has fetched are gone after so long, or after a client's own longer patience.
_REPLY_LIFE_S: Final = 60
_MAX_UNANSWERED: Final = 1000  # chosen: writes that Redis has not acknowledged; more would only fill our memory
_SUBSCRIBE_TIMEOUT_S: Final = 10.0


class RedisBus(LosableBus):
    """The worker's side."""

    def __init__(self, url: str, settings: Settings, clock: Clock) -> None:
        super().__init__()
        self._settings = settings
        self._clock = clock
        self._mailbox = Mailbox(settings)
        urls = parse_redis_url(url, settings)
        self._layout = read_layout(settings, urls[0].db)
        most = settings.fastq_max_message_bytes
        self._sending = AsyncRedis(urls, "fastq-control", max_message_bytes=most)
        self._listening = AsyncRedis(urls, "fastq-control", max_message_bytes=most)
        self._on_request: OnRequest | None = None
        self._is_subscribed = asyncio.Event()
        self._unanswered = 0

    async def open(self, hostname: str, on_request: OnRequest | None) -> None:
        """Connect and listen."""
        timeout_s = self._settings.broker_connection_timeout
        await self._sending.open(timeout_s)
        self._sending.lost.add_done_callback(self._on_lost)
        if on_request is None:
            return
        self._on_request = on_request
        self._listening.on_push = self._on_push
        await self._listening.open(timeout_s)
        self._listening.lost.add_done_callback(self._on_lost)
        self._listening.subscribe(self._layout.channel(self._mailbox.requests, ""))
        subscribed = asyncio.ensure_future(self._is_subscribed.wait())
        either: list[asyncio.Future[Any]] = [subscribed, self._listening.lost]
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not subscribed.done():
            subscribed.cancel()
            if self._listening.lost.done():
                raise self._listening.lost.result()
            raise ConnectionLost(f"Redis at {self._listening.url} did not confirm a subscription")

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == b"subscribe":
            self._is_subscribed.set()
        elif push[0] == b"message" and self._on_request is not None:
            headers, body = opened(push[2])
            self._on_request(headers, body)

    def reply(self, exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Push a reply; one that cannot be sent now is dropped: nobody waits that long."""
        codec = self._mailbox.codec
        key = self._layout.list_of(f"{routing_key}.{exchange}", 0)
        envelope = sealed(exchange, routing_key, headers, body, codec.content_type, codec.content_encoding)
        try:
            # kombu's clients remove the list when they have read it; one that has gone leaves it behind.
            self._send([("LPUSH", key, envelope), ("EXPIRE", key, _REPLY_LIFE_S)])
        except ConnectionLost:
            self.dropped += 1

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Publish an event, which is JSON."""
        exchange = self._settings.event_exchange
        envelope = sealed(exchange, routing_key, headers, body, "application/json", "utf-8")
        self._send([("PUBLISH", self._layout.channel(exchange, routing_key), envelope)])

    def _send(self, commands: Sequence[Command]) -> None:
        if not self._sending.is_open or self.lost.done():
            raise ConnectionLost("remote control and events are not connected")
        if self._unanswered >= _MAX_UNANSWERED:
            raise ConnectionLost(f"Redis at {self._sending.url} takes nothing now")
        self._unanswered += 1
        self._sending.send(commands, self._on_sent)

    def _on_sent(self, replies: list[Any]) -> None:
        self._unanswered -= 1
        for reply in replies:
            if isinstance(reply, RedisError):
                logger.warning("Redis at %s refused an event or reply: %s", self._sending.url, reply)

    async def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float) -> list[Reply]:
        """Broadcast a request and return what comes in time."""
        request = Request(method, arguments, ticket=new_id(), reply_to=new_id())
        headers = {"clock": self._clock.forward(), "expires": time.time() + timeout_s}
        box = _ReplyBox(self._layout, self._mailbox, request)
        await self._sending.pipeline([*box.opening(), box.broadcast(headers)])
        await asyncio.wait([self.lost], timeout=timeout_s)
        (items, *_) = await self._sending.pipeline([("LRANGE", box.key, 0, -1), *box.closing()])
        if isinstance(items, RedisError):
            return []
        self._sending.expect(items, [bytes, ...])
        return [reply for item in reversed(items) for reply in box.read(item)]

    async def close(self) -> None:
        """Close both connections."""
        for connection in (self._listening, self._sending):
            if connection.is_open:
                await connection.close()
        self._lose(ConnectionLost("remote control and events were closed"))


class BlockingRedisBus:
    """The client's side."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._settings = settings
        self._mailbox = Mailbox(settings)
        self._urls = parse_redis_url(url, settings)
        self._layout = read_layout(settings, self._urls[0].db)
        self._sending: BlockingRedis | None = None
        self._listening: BlockingRedis | None = None

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
        box = _ReplyBox(self._layout, self._mailbox, request)
        connection = self._connection(timeout_s)
        _checked(connection.pipeline([*box.opening(), box.broadcast(_request_headers(time.time() + timeout_s))]))
        deadline = time.monotonic() + timeout_s
        missing = set(destination)
        try:
            while (left_s := deadline - time.monotonic()) > 0 and (missing or not destination):
                # Redis takes 0 for "for ever".
                item = connection.call("BRPOP", box.key, f"{max(left_s, 0.01):.3f}")
                if item is None:
                    continue
                for node, reply in box.read(connection.expect(item, [bytes, bytes])[1]):
                    yield node, reply
                    missing.discard(node)
        finally:
            connection.pipeline(box.closing())

    def tell(
        self,
        method: str,
        arguments: Mapping[str, Any],
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> None:
        """Broadcast a request without an address for replies."""
        request = Request(method, arguments, destination, pattern, matcher)
        box = _ReplyBox(self._layout, self._mailbox, request)
        _checked(self._connection(0).pipeline([box.broadcast(_request_headers(0))]))

    def events(self) -> Iterator[tuple[Mapping[str, Any], bytes]]:
        """Listen to every event's channel and return what is published."""
        timeout_s, most = self._settings.broker_connection_timeout, self._settings.fastq_max_message_bytes
        connection = self._listening = BlockingRedis(self._urls, timeout_s, "fastq-events", max_message_bytes=most)
        connection.psubscribe(self._layout.channel(self._settings.event_exchange, "*"))
        # Whoever is told to show himself now is heard.
        if connection.read_push(time.monotonic() + _SUBSCRIBE_TIMEOUT_S) is None:
            raise ConnectionLost(f"Redis at {connection.url} did not confirm a subscription")
        return _arriving(connection)

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Publish an event, which is JSON."""
        if self._sending is None:
            self._connection(0)
        assert self._sending is not None
        exchange = self._settings.event_exchange
        envelope = sealed(exchange, routing_key, headers, body, "application/json", "utf-8")
        self._sending.call("PUBLISH", self._layout.channel(exchange, routing_key), envelope)

    def close(self) -> None:
        """Close the connections."""
        for connection in (self._sending, self._listening):
            if connection is not None:
                connection.close()
        self._sending = self._listening = None

    def _connection(self, patience_s: float) -> BlockingRedis:
        """Return a connection whose replies may take that much longer than the network does."""
        if self._sending is not None:
            self._sending.close()
        timeout_s, most = self._settings.broker_connection_timeout, self._settings.fastq_max_message_bytes
        self._sending = BlockingRedis(self._urls, timeout_s + patience_s, "fastq-control", timeout_s, most)
        return self._sending


def open_bus(url: str, settings: Settings, clock: Clock) -> RedisBus:
    """Return the worker's side."""
    return RedisBus(url, settings, clock)


def open_blocking_bus(url: str, settings: Settings) -> BlockingRedisBus:
    """Return the client's side."""
    return BlockingRedisBus(url, settings)


class _ReplyBox:
    """The list in which the replies to one request arrive, and the binding by which Celery's workers find it."""

    def __init__(self, layout: Layout, mailbox: Mailbox, request: Request) -> None:
        queue = mailbox.reply_queue(request.reply_to)
        self.key = layout.list_of(queue, 0)
        self._layout = layout
        self._mailbox = mailbox
        self._request = request
        self._table = layout.bindings_of(mailbox.replies)
        self._binding = layout.binding(queue, request.reply_to, "direct")

    def opening(self) -> list[Command]:
        """Return what makes the list known."""
        return [("SADD", self._table, self._binding)]

    def broadcast(self, headers: Mapping[str, Any]) -> Command:
        """Return what sends the request."""
        codec, exchange = self._mailbox.codec, self._mailbox.requests
        body = self._mailbox.encode_request(self._request)
        envelope = sealed(exchange, "", headers, body, codec.content_type, codec.content_encoding)
        return ("PUBLISH", self._layout.channel(exchange, ""), envelope)

    def closing(self) -> list[Command]:
        """Return what removes the list."""
        return [("SREM", self._table, self._binding), ("DEL", self.key)]

    def read(self, item: bytes) -> list[Reply]:
        """Return the replies in an item of the list."""
        headers, body = opened(item)
        return self._mailbox.decode_replies(headers, body, self._request.ticket)


def _arriving(connection: BlockingRedis) -> Iterator[tuple[Mapping[str, Any], bytes]]:
    while True:
        push = connection.read_push(time.monotonic() + 60)
        if push is not None and push[0] == b"pmessage":
            yield opened(push[3])


def _request_headers(expires: float) -> dict[str, Any]:
    return {"clock": 0, "expires": expires}


def _checked(replies: list[Any]) -> None:
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply


def sealed(
    exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes, content_type: str, content_encoding: str
) -> bytes:
    """Return a message in kombu's envelope."""
    props = encode_headers(headers, content_type, content_encoding)
    return encode_envelope(exchange, routing_key, props, body, new_id())


def opened(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the headers of an envelope, with the content type, and its body; ({}, b"") when it is none."""
    try:
        props, body, _ = decode_envelope(raw)
    except DecodeError:
        return {}, b""
    headers = decode_headers(props)
    return headers, body if headers else b""
