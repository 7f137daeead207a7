"""A worker's side of Redis as a broker, with kombu's keys and messages, so that Celery workers can share it.

A message that is taken stands in ``unacked`` under its owner's name until it is settled. The owner's ``lease`` is
renewed while the worker lives; what a dead one held goes back to its queues within 15 s. Publishing from programs is
in ``publisher``, keys in ``layout``, the connection in ``aio``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from fastq.brokers.redis.aio import AsyncRedis
from fastq.brokers.redis.commands import bind_commands, check, fanouts_of, refused
from fastq.brokers.redis.jobs import Jobs
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.lease import RedisLease
from fastq.brokers.redis.signals import Signals
from fastq.brokers.redis.source import RedisSource
from fastq.brokers.redis.unacked import Unacked
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost, RedisError, SettingsError
from fastq.queues import QueueSpec, Topology

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.settings import Settings

CLOSE_S: Final = 3.0


class RedisConsumer:
    """A worker's side of Redis. One that does not ``consume`` still publishes.

    Two connections: one for all commands, one that hears of new messages (``signals``).
    """

    source: RedisSource
    outlet: RedisSource
    lost: asyncio.Future[Exception]
    #: Results in Redis go over a connection of their own: ``results.redis.saver``.
    saves_results = False
    replies = None
    source_class = RedisSource

    def __init__(self, url: str, settings: Settings, core: Core | None = None) -> None:
        self._url = url
        self._core = core
        self._urls = parse_redis_url(url, settings)
        self._settings = settings
        self._topology = Topology(settings)
        self._layout = read_layout(settings, self._urls[0].db)
        #: Shown in the server's list of clients; set it before ``open``.
        self.name = "fastq-worker"
        self._redis: AsyncRedis
        self._jobs: Jobs
        self._lease: RedisLease
        self._signals: Signals
        self._upkeep: asyncio.Task[None] | None = None
        self._specs: dict[str, QueueSpec] = {}
        self._has_left = False

    @property
    def queue_specs(self) -> list[QueueSpec]:
        """The queues that are received from."""
        return list(self._specs.values())

    # --- life

    async def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""
        self.lost = asyncio.get_running_loop().create_future()
        redis = self._redis = await self._connect()
        jobs = self._jobs = Jobs(redis.url, self.fail)
        unacked = Unacked(redis, self._layout, self._settings.fastq_max_message_bytes)
        self._lease = RedisLease(self._url, redis, self._layout, unacked, jobs)
        self._signals = Signals(redis, self._layout, jobs)
        self.source = self.outlet = self.source_class(
            redis, self._layout, self._settings, self._core, unacked, self._lease, jobs,
            fanouts=fanouts_of(self._settings, self._topology), await_messages=self._signals.await_messages,
        )  # fmt: skip
        try:
            await unacked.load_scripts()
        except RedisError as error:
            raise SettingsError(f"Redis at {redis.url} does not run scripts: {error}") from None

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Bind the queues and receive from them, at most ``prefetch`` unsettled messages in all."""
        self.source.hold(prefetch)
        self.source.pull(self.source.window)
        await self._signals.start(await self._connect(), self.source)
        await self._lease.take(self.source)
        self._upkeep = asyncio.ensure_future(self._keep_up())
        await self._listen([self._topology.spec(queue) for queue in queues])
        await self._bring_back()

    async def set_prefetch(self, prefetch: int) -> None:
        """Change how many unsettled messages may be here; the core asks for them by itself."""
        self.source.hold(prefetch)

    async def add_queue(self, spec: QueueSpec) -> None:
        """Receive from one more queue, which is bound to its exchange."""
        await self._listen([spec])

    async def cancel_queue(self, name: str) -> None:
        """Receive nothing more from a queue; what is here already goes on."""
        self._specs.pop(name, None)
        self._signals.forget(name)
        self._receive_from_lists()
        await self._redis.fence()

    async def cancel(self) -> None:
        """Stop receiving; nothing new arrives after it returns. Settling goes on."""
        self._specs.clear()
        self._signals.forget()
        self._receive_from_lists()
        # Replies come in order: a claim that was under way has arrived by then.
        await self._redis.fence()

    async def settled(self) -> None:
        """Return when everything that was handed over so far has been carried out. Raises ConnectionLost."""
        await self._jobs.done()
        await self._redis.fence()

    async def close(self) -> None:
        """Give back what is not settled, and leave. After a loss the next connection of this process does it."""
        if self._upkeep is not None:
            self._upkeep.cancel()
        if not self._redis.is_open:
            self._jobs.cancel()
        self._signals.stop_looking()
        with contextlib.suppress(ConnectionLost, RedisError, asyncio.TimeoutError):
            await asyncio.wait_for(self._leave(), CLOSE_S)
        await self._redis.close()
        await self._signals.close()

    def fail(self, error: Exception) -> None:
        """End the connection because of ``error``."""
        if not self.lost.done() and not self._has_left:
            self._lease.abandon()
            self.lost.set_result(ConnectionLost(str(error)) if isinstance(error, RedisError) else error)

    # --- inside

    async def _connect(self) -> AsyncRedis:
        redis = AsyncRedis(self._urls, self.name, max_message_bytes=self._settings.fastq_max_message_bytes)
        await redis.open(self._settings.broker_connection_timeout)
        redis.lost.add_done_callback(lambda lost: self.fail(lost.result()))
        return redis

    async def _listen(self, specs: Sequence[QueueSpec]) -> None:
        commands = [command for spec in specs for command in bind_commands(self._layout, spec)]
        if commands:
            self._check_bound(await self._redis.pipeline(commands))
        for spec in specs:
            self._specs[spec.name] = spec
            if spec.exchange_type == "fanout":
                self._signals.listen(spec)
        self._receive_from_lists()

    def _check_bound(self, replies: list[Any]) -> None:
        full = [reply for reply in replies if isinstance(reply, RedisError) and reply.code == "OOM"]
        if full:
            # To take messages is what helps it; they may well be bound already.
            self._jobs.warn(f"Redis at {self._redis.url} may not know of all queues: {refused(full[0])}")
        check([reply for reply in replies if reply not in full])

    def _receive_from_lists(self) -> None:
        self.source.receive_from([spec.name for spec in self._specs.values() if spec.exchange_type != "fanout"])

    async def _keep_up(self) -> None:
        """Renew the lease, give back what the dead held; until the connection is lost."""
        try:
            while True:
                await asyncio.sleep(self._lease.renew_every_s)
                await self._jobs.patiently(self._lease.renew)
                await self._jobs.patiently(self._bring_back)
                # Whatever was missed is found now.
                self.source.wake()
        except (ConnectionLost, RedisError) as error:
            self.fail(error)

    async def _bring_back(self) -> None:
        """Bring back what waits in Redis and is due before the next look, whoever put it there."""
        if broken := await self.source.unacked.bring_back():
            self._jobs.warn(f"tasks whose time has come cannot go back to {broken}: the key holds something else")

    async def _leave(self) -> None:
        await self.cancel()
        await self.settled()
        await self.source.give_back(self.source.held_fields())
        await self._lease.end(is_certain=not self.lost.done())
        self._has_left = True
