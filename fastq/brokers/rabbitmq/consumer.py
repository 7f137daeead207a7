"""RabbitMQ for the worker, the cold half: connect, declare, subscribe, heartbeats, and what to do when something ends.

Deliveries, acknowledgements and confirms pass through ``link.AmqpLink`` and never come here. Runs on uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from fastq.brokers.rabbitmq.delays import DelayQueues
from fastq.brokers.rabbitmq.handshake import Handshake, closed_early, frame
from fastq.brokers.rabbitmq.link import AmqpLink
from fastq.brokers.rabbitmq.native_delays import binding_steps, delay_steps
from fastq.brokers.rabbitmq.notices import Notices
from fastq.brokers.rabbitmq.refusal import refusal
from fastq.brokers.rabbitmq.task_queues import TaskQueues
from fastq.brokers.rabbitmq.tcp import unreachable
from fastq.brokers.rabbitmq.url import AmqpUrl, Endpoints
from fastq.errors import ConnectionLost, FastqError, RemoteProtocolError, SettingsError
from fastq.net.tcp import connect_first_on, none_reachable, tune_socket
from fastq.net.tls import tls_context, tls_failed
from fastq.queues import QueueSpec, Topology
from fastq.wire.amqp import METHODS, decode_method
from fastq.wire.frames import HEARTBEAT, PROTOCOL_HEADER

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.settings import Settings
    from fastq.wire.message import Message

logger = logging.getLogger("fastq.transport.amqp")

CHANNEL = 1  # the first of either connection: deliveries and acknowledgements on the one, publishing on the other
ADMIN_CHANNEL = 2  # for declaring: a refusal closes this channel and leaves the other ones alone
CLOSE_TIMEOUT_S = 1.0
MAX_PREFETCH = 65535  # a 16-bit field; 0 is no limit
#: Chosen, for queues whose subscription is never given up: tasks that wait for their time fill no less.
LASTING_PREFETCH = 10_000
TIDY_EVERY_S = 1.0
MAX_TAGS = 1000  # chosen: far more subscriptions than messages can be left of
RPC_TIMEOUT_S = 10.0  # chosen: a broker that takes longer to answer is as good as gone


class AmqpConnection:
    """One connection on the event loop: methods and their answers, heartbeats. ``lost`` is done when it has ended."""

    def __init__(self, url: AmqpUrl, link: AmqpLink, heartbeat_s: float, purpose: str) -> None:
        self.url = url
        self.link = link
        self.blocked: str | None = None
        self.on_cancelled: Callable[[str], None] = lambda tag: None
        self.is_vital: Callable[[int], bool] = lambda channel: channel == CHANNEL
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Exception] = self._loop.create_future()
        self._opened: asyncio.Future[Exception | None] = self._loop.create_future()
        self._waiting: defaultdict[tuple[int, int], deque[asyncio.Future[dict[str, Any]]]] = defaultdict(deque)
        self._open_channels: set[int] = set()
        self._declaring = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._notices = Notices(url, self._loop)
        self._handshake = Handshake(url, heartbeat_s, f"fastq {purpose} {os.getpid()}@{socket.gethostname()}")
        self._heartbeat_s: float = self._handshake.heartbeat_s

    async def open(self, timeout_s: float) -> None:
        """Connect and log in. Raises ConnectionLost (try again) or SettingsError (do not)."""
        self.link.on_method = self._on_method
        self.link.on_lost = self._on_lost
        try:
            await asyncio.wait_for(self._connect(), timeout_s)
        except asyncio.TimeoutError:
            self.link.abort()
            raise unreachable(self.url, TimeoutError()) from None
        except BaseException:
            self.link.abort()
            raise
        self._beat(self._loop.time())

    async def _connect(self) -> None:
        tls = self.url.tls
        try:
            sock = await connect_first_on(self._loop, self.url.host, self.url.port)
        except OSError as error:
            raise unreachable(self.url, error) from None
        try:
            transport, _ = await self._loop.create_connection(
                lambda: cast("Any", self.link),
                sock=sock,
                ssl=tls_context(tls) if tls else None,
                server_hostname=(tls.server_name or self.url.host) if tls else None,
            )
        except OSError as error:
            raise (tls_failed if tls else unreachable)(self.url, error) from None
        tune_transport(transport)
        self.link.write(PROTOCOL_HEADER)
        if (failure := await self._opened) is not None:
            raise failure

    # --- methods

    def send(self, method: str, channel: int, /, **fields: Any) -> None:
        """Send a method that has no answer."""
        self.link.write(frame(method, channel, **fields))

    async def rpc(self, channel: int, method: str, /, **fields: Any) -> dict[str, Any]:
        """Send a method and return the fields of its ``-ok`` answer. Raises ConnectionLost, or what a close means."""
        if channel not in self._open_channels and not method.startswith("channel."):
            await self.open_channel(channel)
        if self.lost.done():
            raise ConnectionLost(str(self.lost.result()))
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._waiting[channel, METHODS[f"{method}-ok"]].append(answer)
        self.send(method, channel, **fields)
        try:
            return await asyncio.wait_for(answer, RPC_TIMEOUT_S)
        except asyncio.TimeoutError:
            error = ConnectionLost(f"RabbitMQ at {self.url} did not answer {method} within {RPC_TIMEOUT_S:g} s")
            self._fail(error)
            raise error from None

    async def open_channel(self, channel: int) -> None:
        """Open a channel; ``rpc`` does so by itself."""
        await self.rpc(channel, "channel.open")
        self._open_channels.add(channel)

    async def close_channel(self, channel: int) -> None:
        """Close a channel that is of no use any more."""
        self._open_channels.discard(channel)
        await self.rpc(channel, "channel.close", reply_code=200, reply_text="bye")

    @property
    def channel_max(self) -> int:
        """How many channels there may be."""
        return self._handshake.channel_max

    async def declare(self, spec: QueueSpec) -> None:
        """Create a queue and its binding if they are missing. Raises SettingsError when they exist but differ."""
        await self.declare_steps(spec.steps())

    async def declare_steps(self, steps: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Carry out methods that declare, one after the other. Raises SettingsError for one that is refused."""
        # One at a time: a refusal closes the channel, and is not to hit others who wait on it.
        async with self._declaring:
            for method, fields in steps:
                await self.rpc(ADMIN_CHANNEL, method, **fields)

    def _on_method(self, channel: int, method_id: int, arguments: bytes) -> None:
        try:
            if not self._handshake.is_open:
                self._shake_hands(method_id, arguments)
            elif channel == 0:
                self._on_connection_method(*decode_method(method_id, arguments))
            else:
                self._on_channel_method(channel, method_id, *decode_method(method_id, arguments))
        except FastqError as error:
            self._fail(error)

    def _shake_hands(self, method_id: int, arguments: bytes) -> None:
        if answer := self._handshake.answer(method_id, arguments):
            self.link.write(answer)
        if self._handshake.is_open:
            self.link.frame_max = self._handshake.frame_max
            if not self._opened.done():
                self._opened.set_result(None)

    def _on_connection_method(self, name: str, fields: dict[str, Any]) -> None:
        if name == "connection.close":
            self.send("connection.close-ok", 0)
            raise refusal(self.url, fields)
        if name == "connection.blocked":
            self.blocked = str(fields["reason"])
            self._notices.tell(self.blocked)
        elif name == "connection.unblocked":
            self.blocked = None
            self._notices.tell(None)
        elif name == "connection.close-ok":
            raise ConnectionLost(f"the connection to {self.url} was closed")

    def _on_channel_method(self, channel: int, method_id: int, name: str, fields: dict[str, Any]) -> None:
        if name == "channel.close":
            self._on_channel_close(channel, fields)
        elif name == "basic.cancel":
            self.on_cancelled(fields["consumer_tag"])
        elif answers := self._waiting.get((channel, method_id)):
            answer = answers.popleft()
            if not answer.done():
                answer.set_result(fields)

    def _on_channel_close(self, channel: int, fields: dict[str, Any]) -> None:
        """The broker closed a channel: who waits on it hears why. Without a vital one the connection is of no use."""
        self.send("channel.close-ok", channel)
        self._open_channels.discard(channel)
        error = refusal(self.url, fields)
        if self.is_vital(channel):
            raise error
        self._fail_waiting(error, channel)

    # --- the end

    def _on_lost(self, reason: Exception | None) -> None:
        if not self._handshake.is_open:
            error: Exception = closed_early(self.url)
            if isinstance(reason, RemoteProtocolError):
                error = SettingsError(f"{self.url} does not speak AMQP 0-9-1: {reason}")
        elif isinstance(reason, FastqError):
            error = reason
        else:
            error = ConnectionLost(f"RabbitMQ at {self.url} closed the connection{f': {reason}' if reason else ''}")
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        """End the connection; everybody who waits for something on it gets ``error``."""
        if self._timer is not None:
            self._timer.cancel()
        self._notices.close()
        self.link.on_lost = None
        self.link.abort()
        if not self._opened.done():
            self._opened.set_result(error)
        if not self.lost.done():
            self.lost.set_result(error)
        self._fail_waiting(error, None)
        # Nobody is told of anything any more, and nothing that is kept refers to itself.
        self.on_cancelled = lambda tag: None
        self.is_vital = lambda channel: False

    def _fail_waiting(self, error: Exception, channel: int | None) -> None:
        for (each, _), answers in self._waiting.items():
            if channel is None or each == channel:
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                answers.clear()

    async def close(self) -> None:
        """Say goodbye, wait a moment for the answer, and close."""
        if not self.lost.done() and self._handshake.is_open:
            self.send("connection.close", 0, reply_code=200, reply_text="bye")
            await asyncio.wait([self.lost], timeout=CLOSE_TIMEOUT_S)
        self._fail(ConnectionLost(f"the connection to {self.url} was closed"))

    # --- heartbeats

    def _beat(self, due: float) -> None:
        """Send a heartbeat when nothing else was sent for half an interval; end when nothing came for two."""
        if not self._heartbeat_s or self.lost.done():
            return
        now = self._loop.time()
        silence_s = time.monotonic() - self.link.received_at
        # After a pause of this process (stopped, suspended) the broker's bytes are still waiting to be read.
        was_paused = now - due > self._heartbeat_s
        if silence_s > 2 * self._heartbeat_s and not was_paused and not self.link.is_paused:
            self._fail(ConnectionLost(f"RabbitMQ at {self.url} was silent for {silence_s:.0f} s (broker_heartbeat)"))
            return
        if time.monotonic() - self.link.sent_at >= self._heartbeat_s / 2:
            self.link.write(HEARTBEAT)
        due = now + self._heartbeat_s / 4
        self._timer = self._loop.call_at(due, self._beat, due)


class AmqpConsumer:
    """Consumer for amqp:// and amqps:// (the protocol is ``interfaces.Consumer``).

    Two connections, because a broker that is low on memory stops to read from those that publish: ``source`` consumes
    and acknowledges, ``outlet`` publishes with confirms. The prefetch limit holds for each queue.
    """

    source: AmqpLink
    outlet: AmqpLink
    lost: asyncio.Future[Exception]
    saves_results = False
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
        self._task_queues = TaskQueues(settings)
        self._native_queue_type: str = settings.broker_native_delayed_delivery_queue_type or ""
        self._prefetch = 0
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tidying: asyncio.Task[None] | None = None

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
        self.source.postpone = self._postpone
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
        await asyncio.gather(self._consuming.close(), self._publishing.close())

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

    async def answer(self, task_id: str, meta: bytes) -> None:
        """Publish a result to the queue of the task's own, for clients that give no address and wait there."""
        spec = self._task_queues.spec(task_id)
        if spec is None:
            return
        # The client may have been first, and have declared it in another way: it exists, that is enough.
        with contextlib.suppress(SettingsError):
            await self._publishing.declare(spec)
        self.outlet.publish([(0, self._task_queues.message(spec, task_id, meta))])

    async def prepare_answers(self) -> None:
        """Declare what such clients look for before they wait."""
        method, fields = self._task_queues.exchange()
        with contextlib.suppress(SettingsError):
            await self._publishing.declare_steps([(method, fields)])

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


def tune_transport(transport: asyncio.Transport) -> None:
    """Set the socket options of a connection that the loop has made."""
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as copy:
        tune_socket(copy)
