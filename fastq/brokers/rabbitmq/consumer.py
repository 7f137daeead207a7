"""RabbitMQ for the worker, the cold half: connect, declare, subscribe, heartbeats, and what to do when something ends.

Deliveries, acknowledgements and confirms pass through ``link.AmqpLink`` and never come here. Runs on uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastq.brokers.rabbitmq.aio import ADMIN_CHANNEL, CHANNEL, AmqpConnection
from fastq.brokers.rabbitmq.dead_letters import DeadLetters
from fastq.brokers.rabbitmq.delays import DelayQueues
from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.brokers.rabbitmq.native_delays import binding_steps, delay_steps
from fastq.brokers.rabbitmq.task_queues import TaskQueueReplies
from fastq.brokers.rabbitmq.url import AmqpUrl, Endpoints
from fastq.errors import ConnectionLost, FastqError, SettingsError
from fastq.net.tcp import none_reachable
from fastq.queues import QueueSpec, Topology
from fastq.wire.amqp import METHODS, decode_method

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.link import Delivery
    from fastq.settings import Settings
    from fastq.wire.message import Message

logger = logging.getLogger("fastq.transport.amqp")

MAX_PREFETCH = 65535  # a 16-bit field; 0 is no limit
#: Chosen, for queues whose subscription is never given up: tasks that wait for their time fill no less.
LASTING_PREFETCH = 10_000
TIDY_EVERY_S = 1.0
MAX_TAGS = 1000  # chosen: far more subscriptions than messages can be left of


class AmqpConsumer:
    """Consumer for amqp:// and amqps:// (the protocol is ``interfaces.Consumer``).

    Two connections, because a broker that is low on memory stops to read from those that publish: ``source`` consumes
    and acknowledges, ``outlet`` publishes with confirms. The prefetch limit holds for each queue.
    """

    source: AmqpLink
    outlet: AmqpLink
    lost: asyncio.Future[Exception]
    saves_results = False
    replies: TaskQueueReplies
    name = ""

    def __init__(self, url: str | Sequence[str], settings: Settings, core: Core | None = None) -> None:
        self._endpoints = Endpoints(url, settings)
        self._topology = Topology(settings)
        self._settings = settings
        self._core = core
        self._consuming: AmqpConnection
        self._publishing: AmqpConnection
        self._queues: dict[str, str] = {}  # consumer tag -> queue
        self._channels: dict[str, int] = {}  # consumer tag -> channel
        self._tagged: dict[str, str] = {}  # the same, and those that have ended
        self._added: dict[str, QueueSpec] = {}  # queues that were added while running
        self._tags = itertools.count(1)
        self._delays = DelayQueues()
        self._native_queue_type: str = settings.broker_native_delayed_delivery_queue_type or ""
        self._prefetch = 0
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None
        self._dead_letters: DeadLetters | None = None

    async def open(self) -> None:
        """Connect to the first broker that takes us. Raises ConnectionLost (try again) or SettingsError (do not)."""
        self.lost = asyncio.get_running_loop().create_future()
        failures: list[ConnectionLost] = []
        for url in self._endpoints:
            try:
                return await self._open(url)
            except ConnectionLost as error:
                failures.append(error)
        raise none_reachable(failures)

    async def _open(self, url: AmqpUrl) -> None:
        self.source, self.outlet = AmqpLink(self._core), AmqpLink(self._core)
        heartbeat_s = self._settings.broker_heartbeat if url.heartbeat_s is None else url.heartbeat_s
        self._consuming = AmqpConnection(url, self.source, heartbeat_s, "worker")
        self._publishing = AmqpConnection(url, self.outlet, heartbeat_s, "worker publisher")
        self._consuming.on_cancelled = self._on_cancelled
        self._consuming.is_vital = self._is_vital
        self.outlet.on_returned = self._on_returned
        self.outlet.on_unknown_queue = self._on_unknown_queue
        try:
            for connection in (self._consuming, self._publishing):
                connection.link.max_message_bytes = self._settings.fastq_max_message_bytes
                await connection.open(self._settings.broker_connection_timeout)
            await self._publishing.rpc(CHANNEL, "confirm.select")
        except BaseException:
            await self.close()
            raise
        self.outlet.start_confirms(CHANNEL)
        self.replies = TaskQueueReplies(self._publishing, self._settings)
        self.source.postpone = self._postpone
        if self._core is not None:
            self._dead_letters = DeadLetters(url, self._settings, self._core.buried)
            self.source.dead_letter = self._bury
        for connection in (self._consuming, self._publishing):
            connection.lost.add_done_callback(lambda lost: self._lose(lost.result()))

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Declare the queues and start to receive, at most ``prefetch`` unsettled messages of each (0: no limit)."""
        self._prefetch = min(prefetch, MAX_PREFETCH)
        channel = await self._fresh_channel()
        for queue in dict.fromkeys(queues):
            await self._start(queue, channel)
        await self._start_native_delays()

    @property
    def queue_specs(self) -> list[QueueSpec]:
        """Return the queues that are read."""
        return [self._spec(name) for name in self._queues.values()]

    async def add_queue(self, spec: QueueSpec) -> None:
        """Declare a queue and receive from it too; nothing changes for one that is received from already.

        Raises SettingsError when the broker refuses it; nothing that is here suffers by that.
        """
        async with self._changing:
            if spec.name in self._queues.values():
                return
            await self._try_out(spec)
            self._added[spec.name] = spec
            try:
                await self._start(spec.name, await self._fresh_channel())
            except FastqError:
                del self._added[spec.name]
                raise
            await self._declare_native_delays(binding_steps(spec))

    async def _try_out(self, spec: QueueSpec) -> None:
        """Declare a queue by a connection of its own: the broker ends the whole connection for some mistakes."""
        connection = AmqpConnection(self._consuming.url, AmqpLink(None), 0, "worker trial")
        await connection.open(self._settings.broker_connection_timeout)
        try:
            await connection.declare(spec)
        finally:
            await connection.close()

    async def cancel_queue(self, name: str) -> None:
        """Receive from a queue no longer; what came from it and is here is finished."""
        async with self._changing:
            self._added.pop(name, None)
            for tag in [tag for tag, queue in self._queues.items() if queue == name]:
                await self._stop(tag)

    async def set_prefetch(self, prefetch: int) -> None:
        """Start anew with another limit; what is here unsettled does not count towards it.

        On a channel of its own: RabbitMQ looks through all that a channel has not settled for each acknowledgement.
        """
        async with self._changing:
            self._prefetch = min(prefetch, MAX_PREFETCH)
            try:
                await self._subscribe_anew()
            except FastqError as error:
                self._lose(error)  # some of the queues are not read now
                raise

    async def _subscribe_anew(self) -> None:
        changing = {tag: queue for tag, queue in self._queues.items() if not self._spec(queue).is_lasting}
        if not changing:
            return
        channel = await self._fresh_channel()
        for tag, queue in changing.items():
            if self._spec(queue).needs_consumer:
                await self._subscribe(queue, channel)
                await self._stop(tag)
            else:  # in this order messages keep theirs
                await self._stop(tag)
                await self._subscribe(queue, channel)
        if self._tidying is None or self._tidying.done():
            self._tidying = self._run(self._tidy())

    async def _tidy(self) -> None:
        """Close the channels of earlier subscriptions, each once all that it has brought is settled."""
        while self.source.channels.keys() - set(self._channels.values()):
            await asyncio.sleep(TIDY_EVERY_S)
            async with self._changing:
                for idle in self._idle_channels():
                    self.source.drop_channel(idle)
                    await self._consuming.close_channel(idle)

    async def _fresh_channel(self) -> int:
        """Return the number of a channel with nothing on it; of the one in use when there may be no more of them."""
        for idle in self._idle_channels():
            return idle
        used = {ADMIN_CHANNEL, *self.source.channels}
        number = next((number for number in range(CHANNEL, self._consuming.channel_max + 1) if number not in used), 0)
        if not number:
            return max(self._channels.values(), default=CHANNEL)
        await self._consuming.open_channel(number)
        self.source.add_channel(number)
        return number

    def _idle_channels(self) -> list[int]:
        used = set(self._channels.values())
        return [number for number in self.source.idle_channels() if number not in used]

    def _is_vital(self, channel: int) -> bool:
        """Whether a channel holds what would be lost with it: a subscription, or messages that are not settled."""
        return channel in self.source.channels and channel not in self._idle_channels()

    async def cancel(self) -> None:
        """Stop receiving; nothing new arrives after it returns. Settling goes on."""
        async with self._changing:
            for tag in list(self._queues):
                await self._stop(tag)

    async def close(self) -> None:
        """Close both connections; what is not settled goes back to the broker."""
        for task in self._tasks:
            task.cancel()
        closing = [self._consuming.close(), self._publishing.close()]
        if self._dead_letters is not None:
            closing.append(self._dead_letters.close())
        await asyncio.gather(*closing)

    def _spec(self, queue: str) -> QueueSpec:
        return self._added.get(queue) or self._topology.spec(queue)

    async def _start(self, queue: str, channel: int) -> None:
        if queue in self._added or self._topology.may_create(queue):
            await self._consuming.declare(self._spec(queue))
        await self._subscribe(queue, channel)

    async def _start_native_delays(self) -> None:
        """Have what Celery's senders delay find its way here, where they do so: with quorum queues."""
        if self._uses_native_delays():
            await self._declare_native_delays(delay_steps(self._native_queue_type))
            for spec in self.queue_specs:
                await self._declare_native_delays(binding_steps(spec))

    def _uses_native_delays(self) -> bool:
        return bool(self._native_queue_type) and self._topology.has_quorum_queues

    async def _declare_native_delays(self, steps: Iterable[tuple[str, dict[str, Any]]]) -> None:
        if not self._uses_native_delays():
            return
        try:
            for method, fields in steps:
                await self._consuming.rpc(ADMIN_CHANNEL, method, **fields)
        except SettingsError as error:
            # As in Celery: tasks without a delay are not to suffer.
            logger.warning("messages that senders have delayed may not arrive: %s", error)

    async def _subscribe(self, queue: str, channel: int) -> None:
        spec = self._spec(queue)
        prefetch = self._prefetch
        if spec.is_lasting and prefetch:
            prefetch = max(prefetch, LASTING_PREFETCH)
        # Never global: a quorum queue refuses that by closing the connection.
        await self._consuming.rpc(channel, "basic.qos", prefetch_count=prefetch, global_=False)
        tag = f"fastq-{next(self._tags)}"
        self._tagged[tag] = queue
        if len(self._tagged) > MAX_TAGS:
            del self._tagged[next(iter(self._tagged))]
        arguments = spec.consumer_arguments
        await self._consuming.rpc(channel, "basic.consume", queue=queue, consumer_tag=tag, arguments=arguments)
        self._queues[tag], self._channels[tag] = queue, channel

    async def _stop(self, tag: str) -> None:
        del self._queues[tag]
        await self._consuming.rpc(self._channels.pop(tag), "basic.cancel", consumer_tag=tag)

    def _on_cancelled(self, tag: str) -> None:
        """The broker ended a subscription: its queue was deleted or has moved. Make it again."""
        queue = self._queues.pop(tag, None)
        self._channels.pop(tag, None)
        if queue is not None:
            logger.warning(
                "RabbitMQ at %s cancelled the consumer of %r; declaring it again", self._consuming.url, queue
            )
            self._run(self._restore(queue))

    async def _restore(self, queue: str) -> None:
        async with self._changing:
            await self._start(queue, await self._fresh_channel())

    def _postpone(self, found: dict[str, Any], due: float) -> Message | None:
        """Return the message that brings a delivery back nearer its time; None as long as there is no queue for it."""
        queue = self._tagged.get(found["consumer"])
        seconds = self._delays.span(due - time.time())
        if queue is None or seconds is None:
            return None
        if seconds in self._delays.known:
            return self._delays.message(found, queue, seconds)
        if seconds not in self._delays.asked:
            self._delays.asked.add(seconds)
            self._run(self._declare_delay(seconds))
        return None

    def _bury(self, delivery: Delivery, reason: str) -> bool:
        """Move a rejected message to where its queue's arguments say; False leaves that to the broker."""
        queue = self._tagged.get(delivery.describe()["consumer"])
        return (
            self._dead_letters is not None
            and queue is not None
            and self._dead_letters.take(delivery, self._spec(queue), reason)
        )

    async def _declare_delay(self, seconds: int) -> None:
        try:
            await self._publishing.declare_steps(self._delays.steps(seconds))
        except SettingsError as error:
            # We may not declare it, or somebody else has, otherwise: then tasks wait in this process, as before.
            logger.warning("tasks that are due later wait in the worker: %s", error)
            return
        self._delays.known.add(seconds)
        if self._core is not None:
            self._core.postpone_far()

    def _on_returned(self, returned: dict[str, Any]) -> None:
        """A message that a task sent has no queue: the core runs the task again, and then there is to be one."""
        _, fields = decode_method(METHODS["basic.return"], returned["arguments"])
        exchange, queue = fields["exchange"], fields["routing_key"]
        logger.warning("RabbitMQ at %s has no queue for a message to %r", self._publishing.url, exchange or queue)
        if not exchange and self._topology.may_create(queue):
            self._run(self._publishing.declare(self._topology.spec(queue)))

    def _on_unknown_queue(self, queue: str) -> None:
        """A task sends to a queue for the first time: create it if we may, then let the message go."""
        self._run(self._make_known(queue))

    async def _make_known(self, queue: str) -> None:
        if self._topology.may_create(queue):
            # It may exist with other arguments than ours: then it is somebody else's, and good enough to send to.
            with contextlib.suppress(SettingsError):
                await self._publishing.declare(self._topology.spec(queue))
        self.outlet.queue_known(queue)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._lose(error if isinstance(error, FastqError) else ConnectionLost(repr(error)))

    def _lose(self, error: Exception) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
