"""A worker's side of Redis as a broker, with kombu's keys and messages, so that Celery workers can share it.

A message that is taken stands in ``unacked`` under its owner's name until it is settled. The owner's lease is renewed
while the worker lives; what a dead one held goes back to its queues within 15 s. Publishing from programs is in
``publisher``, keys in ``layout``, the connection in ``aio``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from fastq.brokers.redis import scripts
from fastq.brokers.redis.aio import AsyncRedis
from fastq.brokers.redis.commands import (
    bind_commands,
    check,
    fanouts_of,
    refused,
)
from fastq.brokers.redis.digests import run_script
from fastq.brokers.redis.layout import read_layout
from fastq.brokers.redis.login import INVALIDATED, PASSING_CODES
from fastq.brokers.redis.source import MAX_CLAIM, RETRY_S, RedisSource
from fastq.brokers.redis.url import parse_redis_url
from fastq.errors import ConnectionLost, RedisError, SettingsError
from fastq.queues import QueueSpec, Topology

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.brokers.redis.login import Command
    from fastq.settings import Settings

logger = logging.getLogger("fastq.transport.redis")

P = ParamSpec("P")
T = TypeVar("T")

#: Together at most 15 s (reliability rules, section 3): a lease runs out, is seen to have run out, and is not renewed.
LEASE_S: Final = 8.0
RENEW_EVERY_S: Final = 3.0
GRACE_S: Final = 2.0

POLL_S: Final = 0.1  # chosen: without server-assisted tracking the queues are looked at so often
CLOSE_S: Final = 3.0


class RedisConsumer:
    """A worker's side of Redis. One that does not ``consume`` still publishes.

    Two connections: one for all commands, one that hears of new messages (the server tells which of the lists that
    were empty have changed: client-side caching with a redirection, Redis 6 or later) and of fanout messages.
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
        self.fanouts = fanouts_of(settings, self._topology)
        #: Shown in the server's list of clients; set it before ``open``.
        self.name = "fastq-worker"
        self._loop: asyncio.AbstractEventLoop
        self._redis: AsyncRedis
        self._signals: AsyncRedis | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._upkeep: asyncio.Task[None] | None = None
        self._patterns: dict[str, str] = {}
        self._specs: dict[str, QueueSpec] = {}
        self._is_tracking = False
        self._may_listen: asyncio.Future[None]
        self._poll: asyncio.TimerHandle | None = None
        self._renewed_at = 0.0
        self._is_asking = False
        self._touched_at = 0.0
        self._warned: dict[str, float] = {}
        self._inherited: set[str] = set()
        self._has_left = False

    @property
    def scheduled(self) -> int:
        """How many messages wait in this process for their time."""
        return int(self._core.stats()["scheduled"]) if self._core is not None else 0

    @property
    def free_children(self) -> int:
        """How many more calls the children could begin now, without one that waits."""
        core = self._core
        if core is None:
            return MAX_CLAIM
        return len(core.children) - core.load

    @property
    def queue_specs(self) -> list[QueueSpec]:
        """The queues that are received from."""
        return list(self._specs.values())

    # --- life

    async def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""
        self._loop = asyncio.get_running_loop()
        self.lost = self._loop.create_future()
        self._redis = await self._connect()
        self.source = self.outlet = self.source_class(self, self._redis, self._layout, self._settings)
        try:
            await self.source.unacked.load_scripts()
        except RedisError as error:
            raise SettingsError(f"Redis at {self._redis.url} does not run scripts: {error}") from None

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Bind the queues and receive from them, at most ``prefetch`` unsettled messages in all."""
        self.source.hold(prefetch)
        self.source.pull(self.source.window)
        self._signals = await self._connect()
        self._signals.on_push = self._on_push
        await self._start_tracking(self._signals)
        await self._renew(joins=True)
        self._upkeep = self._loop.create_task(self._keep_up())
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
        for pattern in [pattern for pattern, queue in self._patterns.items() if queue == name]:
            del self._patterns[pattern]
        self._receive_from_lists()
        await self._redis.fence()

    async def cancel(self) -> None:
        """Stop receiving; nothing new arrives after it returns. Settling goes on."""
        self._specs.clear()
        self._patterns.clear()
        self._receive_from_lists()
        # Replies come in order: a claim that was under way has arrived by then.
        await self._redis.fence()

    async def settled(self) -> None:
        """Return when everything that was handed over so far has been carried out. Raises ConnectionLost."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._redis.fence()

    async def close(self) -> None:
        """Give back what is not settled, and leave. After a loss the next connection of this process does it."""
        for task in (self._upkeep, *([] if self._redis.is_open else self._tasks)):
            if task is not None:
                task.cancel()
        if self._poll is not None:
            self._poll.cancel()
        with contextlib.suppress(ConnectionLost, RedisError, asyncio.TimeoutError):
            await asyncio.wait_for(self._leave(), CLOSE_S)
        await self._redis.close()
        if self._signals is not None:
            await self._signals.close()

    # --- for the source

    def fail(self, error: Exception) -> None:
        """End the connection because of ``error``."""
        if not self.lost.done() and not self._has_left:
            _ABANDONED.setdefault(self._url, set()).add(self.source.owner)
            self.lost.set_result(ConnectionLost(str(error)) if isinstance(error, RedisError) else error)

    def warn(self, text: str) -> None:
        """Log what goes wrong, the same at most once a minute."""
        now = self._loop.time()
        if now - self._warned.get(text, -60.0) >= 60.0:
            self._warned = {text: now}
            logger.error("%s", text)

    async def patiently(self, work: Callable[P, Awaitable[T]], *arguments: P.args, **options: P.kwargs) -> T:
        """Return what the work returns; done again as long as the server refuses it for now."""
        while True:
            try:
                return await work(*arguments, **options)
            except RedisError as error:
                if error.code not in PASSING_CODES:
                    raise
                self.warn(f"Redis at {self._redis.url} refuses for now: {error}")
                await asyncio.sleep(RETRY_S)

    def doubts_lease(self) -> bool:
        """Whether this process stood still for so long that others may have taken over.

        Redis is asked then, and the source told to ``go_on``.
        """
        if self._is_asking:
            return True
        if self._upkeep is None or self._loop.time() - self._renewed_at < LEASE_S:
            return False
        self._is_asking = True
        self.spawn(self._ask_for_lease())
        return True

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that takes several calls; its failure ends the connection."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def await_messages(self) -> None:
        """Have the source woken when one of its lists, empty by now, gets a message."""
        if not self._is_tracking:
            self._poll_later()
        elif lists := self.source.lists:
            # Asking for a key is what makes the server tell of its next change, once.
            self._redis.send([("EXISTS", *lists)], self._on_looked)

    # --- inside: new messages

    async def _connect(self) -> AsyncRedis:
        redis = AsyncRedis(self._urls, self.name, max_message_bytes=self._settings.fastq_max_message_bytes)
        await redis.open(self._settings.broker_connection_timeout)
        redis.lost.add_done_callback(lambda lost: self.fail(lost.result()))
        return redis

    async def _start_tracking(self, signals: AsyncRedis) -> None:
        self._may_listen = self._loop.create_future()
        signals.on_refused = self._on_refused
        try:
            number = signals.expect(await signals.call("CLIENT", "ID"), int)
            signals.subscribe(INVALIDATED)
            either: list[asyncio.Future[Any]] = [self._may_listen, signals.lost]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if signals.lost.done():
                raise ConnectionLost(str(signals.lost.result()))
            self._may_listen.result()
            await self._redis.call("CLIENT", "TRACKING", "ON", "REDIRECT", number)
            self._is_tracking = True
        except RedisError as error:
            logger.warning(
                "Redis at %s does not tell of new messages (%s); looking every %s s", signals.url, error, POLL_S
            )

    def _on_refused(self, error: RedisError) -> None:
        if not self._may_listen.done():
            self._may_listen.set_exception(error)
        else:
            self.warn(f"Redis at {self._redis.url} refuses to listen to a fanout exchange: {error}")

    def _on_looked(self, replies: list[Any]) -> None:
        if isinstance(replies[0], RedisError) and replies[0].code in PASSING_CODES:
            self._poll_later()
        elif isinstance(replies[0], RedisError):
            self.fail(replies[0])
        elif replies[0]:
            self.source.wake()

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == b"message":
            self.source.wake()
        elif push[0] == b"subscribe" and not self._may_listen.done():
            self._may_listen.set_result(None)
        elif push[0] == b"pmessage":
            queue = self._patterns.get(push[1].decode("utf-8", "replace"))
            if queue is not None:
                self.source.take_fanout(queue, push[3])

    def _poll_later(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
        self._poll = self._loop.call_later(POLL_S, self.source.wake)

    async def _listen(self, specs: Sequence[QueueSpec]) -> None:
        assert self._signals is not None, "consume() first"
        commands = [command for spec in specs for command in bind_commands(self._layout, spec)]
        if commands:
            self._check_bound(await self._redis.pipeline(commands))
        for spec in specs:
            self._specs[spec.name] = spec
            if spec.exchange_type == "fanout":
                pattern = self._layout.channel(spec.exchange, spec.routing_key.replace("#", "*"))
                self._patterns[pattern] = spec.name
                self._signals.psubscribe(pattern)
        self._receive_from_lists()

    def _check_bound(self, replies: list[Any]) -> None:
        full = [reply for reply in replies if isinstance(reply, RedisError) and reply.code == "OOM"]
        if full:
            # To take messages is what helps it; they may well be bound already.
            self.warn(f"Redis at {self._redis.url} may not know of all queues: {refused(full[0])}")
        check([reply for reply in replies if reply not in full])

    def _receive_from_lists(self) -> None:
        self.source.receive_from([spec.name for spec in self._specs.values() if spec.exchange_type != "fanout"])

    # --- inside: leases

    async def _keep_up(self) -> None:
        """Renew the lease, give back what the dead held; until the connection is lost."""
        try:
            while True:
                await asyncio.sleep(min(RENEW_EVERY_S, self._layout.visibility_timeout_s / 4))
                await self.patiently(self._renew, joins=False)
                await self.patiently(self._bring_back)
                # Whatever was missed is found now.
                self.source.wake()
        except (ConnectionLost, RedisError) as error:
            self.fail(error)

    async def _ask_for_lease(self) -> None:
        """Take the lease up again, unless somebody has taken this worker for dead; then the connection ends."""
        is_trusted = False
        try:
            await self.patiently(self._renew, joins=False)
            is_trusted = True
        finally:
            self._is_asking = False
            self.source.go_on(is_trusted)

    async def _bring_back(self) -> None:
        """Bring back what waits in Redis and is due before the next look, whoever put it there."""
        if broken := await self.source.unacked.bring_back():
            self.warn(f"tasks whose time has come cannot go back to {broken}: the key holds something else")

    async def _renew(self, joins: bool) -> None:
        asked_at, timeout_s = self._loop.time(), self._layout.visibility_timeout_s
        touched: list[str] = []
        if asked_at - self._touched_at >= timeout_s / 4:
            # What is held here must not look overdue to others.
            self._touched_at, touched = asked_at, self.source.held_fields()
        keys = (self._layout.leases, self._layout.unacked_index)
        renew = run_script(scripts.RENEW, keys, self.source.owner, LEASE_S, GRACE_S, timeout_s, int(joins), *touched)
        # Earlier connections of this process: nobody holds what they took.
        abandoned = _ABANDONED.pop(self._url, set()) if joins else set()
        bury: list[Command] = [("ZADD", self._layout.leases, "XX", 0, owner) for owner in abandoned]
        try:
            replies = await asyncio.wait_for(self._redis.pipeline([*bury, renew]), LEASE_S)
        except asyncio.TimeoutError:
            if self._loop.time() - asked_at < LEASE_S + RENEW_EVERY_S and not self.lost.done():
                raise ConnectionLost(f"Redis at {self._redis.url} has not answered for {LEASE_S} s") from None
            # This process stood still while it was asking: the answer may have been there all the time.
            await self._renew(joins)
            return
        texts = [bytes, ...]
        is_trusted, buried, overdue = self._redis.expect(check(replies[-1:])[0], [int, texts, texts])
        if not is_trusted:
            raise ConnectionLost(f"{self.source.owner} was taken for dead: it did not renew its lease in time")
        self._renewed_at = asked_at
        for owner in {name.decode() for name in buried} - self._inherited:
            # Not here: a long inheritance must not keep us from renewing our own lease.
            self.spawn(self._inherit(owner))
        if overdue:
            count = await self.source.give_back([field.decode() for field in reversed(overdue)])
            logger.warning("gave back %d messages that were held for more than %s s", count, timeout_s)

    async def _inherit(self, owner: str) -> None:
        """Give back what a dead owner held, and forget the owner."""
        self._inherited.add(owner)
        fields = await self.patiently(self.source.unacked.fields_of, owner)
        count = await self.patiently(self.source.give_back, fields)
        await self.patiently(self._redis.call, "ZREM", self._layout.leases, owner)
        if count:
            logger.warning("gave back %d messages that a dead worker (%s) held", count, owner)
        self._inherited.discard(owner)

    async def _leave(self) -> None:
        await self.cancel()
        await self.settled()
        await self.source.give_back(self.source.held_fields())
        if self.lost.done():
            # It may have taken what it never heard of: whoever renews a lease next puts that back.
            await self._redis.call("ZADD", self._layout.leases, "XX", 0, self.source.owner)
        else:
            await self._redis.call("ZREM", self._layout.leases, self.source.owner)
        self._has_left = True

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, (ConnectionLost, RedisError)):
                raise error
            self.fail(error)


#: Owners whose connection was lost in this process, by URL.
_ABANDONED: dict[str, set[str]] = {}
