"""Publishing to Redis from an event loop: any number of callers on one connection. Retries are theirs."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fastq.brokers.on_loop import Line, LoopPublisher, Wait
from fastq.brokers.redis import login
from fastq.brokers.redis.aio import AsyncRedis
from fastq.brokers.redis.commands import bind_commands, fanout_command, fanouts_of, push_command, refused, routed
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.publisher import unknown_fate
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost, FastqError, RedisError
from fastq.queues import Topology

if TYPE_CHECKING:
    from fastq.brokers.redis.login import Command
    from fastq.settings import Settings
    from fastq.wire.message import Message


class RedisWait(Wait):
    """Somebody whose commands are to be answered."""

    __slots__ = ("count", "replies")

    def __init__(self, messages: Sequence[Message], answered: asyncio.Future[None], count: int) -> None:
        super().__init__(messages, answered)
        self.count = count
        self.replies: list[Any] = []


class RedisLine(Line[RedisWait]):
    """One connection to Redis that is published on."""

    def __init__(self, redis: AsyncRedis, rules: Rules) -> None:
        super().__init__()
        self._redis = redis
        self._rules = rules
        self._out: list[Command] = []
        self._asking: list[RedisWait] = []  # whose commands those are
        redis.lost.add_done_callback(self.on_lost)

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return not self._redis.is_open

    async def publish(self, messages: Sequence[Message], until: float) -> None:
        """Store the messages. Raises PublishError when Redis refused or the fate is unknown."""
        layout = self._rules.layout
        commands: list[Command] = []
        # Everything is encoded before anything is sent.
        for message in messages:
            if not message.exchange:
                commands.append(push_command(layout, message))
            elif message.exchange in self._rules.fanouts:
                commands.append(fanout_command(layout, message))
            else:
                (members,) = await self._ask([("SMEMBERS", layout.bindings_of(message.exchange))], messages, until)
                commands += routed(layout, message, self._redis.expect(members, [bytes, ...]))
        for reply in await self._ask(commands, messages, until):
            self._redis.expect(reply, int)

    async def declare(self, queue: str, until: float) -> None:
        """Let exchanges know the queue; the queue itself is there as soon as it holds a message."""
        commands = bind_commands(self._rules.layout, self._rules.topology.spec(queue))
        if commands:
            await self._ask(commands, (), until)

    async def close(self) -> None:
        """Send what was written, then close."""
        await self._redis.close()

    async def _ask(self, commands: Sequence[Command], messages: Sequence[Message], until: float) -> list[Any]:
        """Return the replies to commands, which go out with those of others."""
        if self.is_lost:
            raise ConnectionLost(str(self._redis.lost.result()) if self._redis.lost.done() else "the connection ended")
        wait = RedisWait(messages, self._loop.create_future(), len(commands))
        if not self._out and not self._waits:
            self._redis.send(commands, partial(self._on_replies, [wait]))  # the first need not wait for others
        else:
            if not self._out:
                self._loop.call_soon(self._flush)
            self._out += commands
            self._asking.append(wait)
        await self.wait(wait, until)
        return wait.replies

    def _flush(self) -> None:
        out, self._out = self._out, []
        asking, self._asking = self._asking, []
        self._redis.send(out, partial(self._on_replies, asking))

    def _on_replies(self, asking: list[RedisWait], replies: list[Any]) -> None:
        start = 0
        for wait in asking:
            wait.replies, start = replies[start : start + wait.count], start + wait.count
            error = next((reply for reply in wait.replies if isinstance(reply, RedisError)), None)
            if error is not None:
                wait.fail(refused(error))
            elif not wait.answered.done():
                wait.answered.set_result(None)

    def is_late(self, wait: RedisWait) -> FastqError:
        """Return the error for replies that did not come in time."""
        return self.lost_error(wait, login.silent(self._redis.url, wait.span_s))

    def lost_error(self, wait: RedisWait, error: Exception) -> FastqError:
        """Return what a wait ends with."""
        return unknown_fate(error) if isinstance(error, ConnectionLost) else cast("FastqError", copy.copy(error))


class Rules:
    """How messages are laid out, by the settings."""

    def __init__(self, settings: Settings, database: int) -> None:
        self.topology = Topology(settings)
        self.fanouts = fanouts_of(settings, self.topology)
        self.layout = read_layout(settings, database)


class RedisLoopPublisher(LoopPublisher):
    """AsyncPublisher for redis:// and its kin (the protocol is ``interfaces.AsyncPublisher``)."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._urls = parse_redis_url(url, settings)
        self._settings = settings
        self._rules = Rules(settings, self._urls[0].db)
        super().__init__(self._open, self._urls[0], settings)

    async def _open(self) -> RedisLine:
        settings = self._settings
        redis = AsyncRedis(self._urls, "fastq-producer", max_message_bytes=settings.fastq_max_message_bytes)
        await redis.open(min(settings.fastq_publish_timeout, settings.broker_connection_timeout))
        return RedisLine(redis, self._rules)
