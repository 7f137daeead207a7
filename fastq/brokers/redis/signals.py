"""How a worker hears of new messages in Redis, and of fanout messages, on a connection of its own. Takes none itself.

The server tells which of the lists that were empty have changed: client-side caching with a redirection, Redis 6 or
later. Where it may not, the lists are looked at now and then.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, Protocol

from fastq.brokers.redis.login import INVALIDATED, PASSING_CODES
from fastq.errors import ConnectionLost, RedisError

if TYPE_CHECKING:
    from fastq.brokers.redis.aio import AsyncRedis
    from fastq.brokers.redis.jobs import Jobs
    from fastq.brokers.redis.layout import Layout
    from fastq.queues import QueueSpec

logger = logging.getLogger("fastq.transport.redis")

POLL_S: Final = 0.1  # chosen: without server-assisted tracking the queues are looked at so often


class Receiver(Protocol):
    """Who is told."""

    @property
    def lists(self) -> list[str]:
        """Return the lists that are received from."""

    def wake(self) -> None:
        """Look for messages: there may be new ones."""

    def take_fanout(self, queue: str, envelope: bytes) -> None:
        """Take a fanout message, which is nowhere else."""


class Signals:
    """Of one consumer. ``redis`` is its connection for commands; the one that hears comes with ``start``."""

    def __init__(self, redis: AsyncRedis, layout: Layout, jobs: Jobs) -> None:
        self._redis = redis
        self._layout = layout
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._receiver: Receiver
        self._heard: AsyncRedis | None = None
        self._patterns: dict[str, str] = {}
        self._is_tracking = False
        self._may_listen: asyncio.Future[None] = self._loop.create_future()
        self._poll: asyncio.TimerHandle | None = None

    async def start(self, heard: AsyncRedis, receiver: Receiver) -> None:
        """Hear from now on, for the receiver."""
        self._heard, self._receiver = heard, receiver
        heard.on_push = self._on_push
        heard.on_refused = self._on_refused
        try:
            number = heard.expect(await heard.call("CLIENT", "ID"), int)
            heard.subscribe(INVALIDATED)
            either: list[asyncio.Future[Any]] = [self._may_listen, heard.lost]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if heard.lost.done():
                raise ConnectionLost(str(heard.lost.result()))
            self._may_listen.result()
            await self._redis.call("CLIENT", "TRACKING", "ON", "REDIRECT", number)
            self._is_tracking = True
        except RedisError as error:
            logger.warning(
                "Redis at %s does not tell of new messages (%s); looking every %s s", heard.url, error, POLL_S
            )

    def await_messages(self) -> None:
        """Have the receiver woken when one of its lists, empty by now, gets a message."""
        if not self._is_tracking:
            self._poll_later()
        elif lists := self._receiver.lists:
            # Asking for a key is what makes the server tell of its next change, once.
            self._redis.send([("EXISTS", *lists)], self._on_looked)

    def listen(self, spec: QueueSpec) -> None:
        """Take the messages of a queue's fanout exchange."""
        assert self._heard is not None, "start() first"
        pattern = self._layout.channel(spec.exchange, spec.routing_key.replace("#", "*"))
        self._patterns[pattern] = spec.name
        self._heard.psubscribe(pattern)

    def forget(self, queue: str | None = None) -> None:
        """Take no more fanout messages of a queue; of none without one."""
        self._patterns = {pattern: name for pattern, name in self._patterns.items() if queue not in (None, name)}

    def stop_looking(self) -> None:
        """Do not look now and then any more."""
        if self._poll is not None:
            self._poll.cancel()

    async def close(self) -> None:
        """Close the connection."""
        if self._heard is not None:
            await self._heard.close()

    # --- inside

    def _on_refused(self, error: RedisError) -> None:
        if not self._may_listen.done():
            self._may_listen.set_exception(error)
        else:
            self._jobs.warn(f"Redis at {self._redis.url} refuses to listen to a fanout exchange: {error}")

    def _on_looked(self, replies: list[Any]) -> None:
        if isinstance(replies[0], RedisError) and replies[0].code in PASSING_CODES:
            self._poll_later()
        elif isinstance(replies[0], RedisError):
            self._jobs.fail(replies[0])
        elif replies[0]:
            self._receiver.wake()

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == b"message":
            self._receiver.wake()
        elif push[0] == b"subscribe" and not self._may_listen.done():
            self._may_listen.set_result(None)
        elif push[0] == b"pmessage":
            queue = self._patterns.get(push[1].decode("utf-8", "replace"))
            if queue is not None:
                self._receiver.take_fanout(queue, push[3])

    def _poll_later(self) -> None:
        self.stop_looking()
        self._poll = self._loop.call_later(POLL_S, self._receiver.wake)
