"""The seams between fastq's parts, as protocols. Read this file first; it has no behaviour.

A message's life has three nouns, ``Delivery`` (as received), ``Call`` (in the child), ``Outcome`` (how it ended), and
five verbs: receive, submit, collect, save, settle. Each seam is crossed once per batch, never once per message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import asyncio

    from fastq._child import Child
    from fastq.link import BatchSource, Delivery, Source
    from fastq.queues import QueueSpec
    from fastq.wire.message import Message

#: A stored result in Celery's layout: ``status``, ``result``, ``traceback``, ``children``, ``date_done``, ``task_id``…
Meta: TypeAlias = Mapping[str, Any]
#: A result to save: task id, state, encoded meta, reply address, token for the confirmation (0: none is wanted).
SaveItem: TypeAlias = tuple[str, str, bytes, str, int]
#: Ends a watch for a result.
Unwatch: TypeAlias = Callable[[], None]
#: A message of the bus as it arrives: headers, with the content type as ``content_type``, and body.
BusMessage: TypeAlias = "tuple[Mapping[str, Any], bytes]"
#: A node's name and its reply to a command.
Reply: TypeAlias = "tuple[str, Any]"
OnRequest: TypeAlias = "Callable[[Mapping[str, Any], bytes], None]"


class Codec(Protocol):
    """A serializer: values to bytes and back."""

    name: str
    content_type: str
    content_encoding: str

    def encode(self, value: Any) -> bytes:
        """Return the value as bytes. Raises EncodeError."""

    def decode(self, data: bytes) -> Any:
        """Return the value in the bytes. Raises DecodeError."""


class Publisher(Protocol):
    """The producer's side of a broker. Thread-safe; notices a fork and opens a connection of its own."""

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Return when the broker has confirmed every message: one wait for the batch. Raises PublishError.

        ``deadline`` (monotonic) ends it sooner than the settings' own time-outs.
        """

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing; ``deadline`` as for ``publish``."""

    def purge(self, queue: str) -> int:
        """Drop the waiting messages of a queue and return how many there were."""

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue."""

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""


class AsyncPublisher(Protocol):
    """The producer's side of a broker on one event loop, for all its coroutines. Nothing here blocks the loop."""

    async def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Return when the broker has confirmed every message. Raises PublishError; ConnectionLost: nothing was sent.

        ``deadline`` (monotonic) ends it sooner than the settings' own time-outs. Who is cancelled while waiting may
        have sent the messages.
        """

    async def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing; ``deadline`` as for ``publish``."""

    async def close(self) -> None:
        """Close the connection; a later call opens a new one."""


class ResultStore(Protocol):
    """The caller's side of a result store. Thread-safe and fork-aware."""

    def reply_address(self, deadline: float | None = None) -> str | None:
        """Return what messages carry as ``reply_to`` so that results find this process; None when nothing is needed.

        ``deadline`` (monotonic) bounds a reconnect that this takes.
        """

    def is_there(self) -> bool:
        """Return whether ``reply_address``, ``watch`` and ``observe`` wait for nothing, as the store was reached."""

    def load(self, task_id: str) -> Meta | None:
        """Return the stored meta, or None when nothing is known of the task."""

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Block until a final state is known and return its meta. Raises ResultTimeout."""

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Call back once, from a background thread, when a final state is known.

        The function that is returned ends the watch. It never waits, and does nothing once there was a call.
        """

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Do as ``watch`` does, for each state as it becomes known, the one that is known already included.

        A state that lasts for a moment only may be passed over where states are looked for, not told.
        """

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Store an encoded meta."""

    def forget(self, task_id: str) -> None:
        """Drop what is stored of a task."""

    def close(self) -> None:
        """Release connections and threads."""


class Saver(Protocol):
    """The worker's side of a result store, on the parent's event loop; the core saves through ``source``."""

    source: BatchSource
    lost: asyncio.Future[Exception]
    #: The worker's node name, for stores that list their clients.
    name: str

    async def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""

    async def close(self) -> None:
        """Store what was handed over and close the connection."""


class ReplySaver(Protocol):
    """Puts results where callers look for them who gave no address. Needs no ``Saver``'s source: there are few."""

    async def prepare(self) -> None:
        """Declare what such callers look for before they wait."""

    async def save(self, task_id: str, meta: bytes) -> None:
        """Send a result: the stored form of a final state."""


class Consumer(Protocol):
    """The worker's side of a broker: the cold half, on the parent's event loop. ``source`` is the compiled hot half."""

    source: Source
    #: Where follow-ups and replies are published: a second connection with AMQP, else the source itself.
    outlet: Source
    lost: asyncio.Future[Exception]
    #: Whether results of this URL are stored through ``source`` too, in one transaction with the verdicts.
    saves_results: bool
    #: Reaches callers who gave no address for their results; None where there is no way to.
    replies: ReplySaver | None
    #: The worker's node name, for brokers that list their workers.
    name: str

    async def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Declare the queues and start to receive, at most ``prefetch`` unsettled messages of each at a time."""

    async def set_prefetch(self, prefetch: int) -> None:
        """Change how many unsettled messages may be here; what waits already does not count with AMQP."""

    @property
    def queue_specs(self) -> Sequence[QueueSpec]:
        """Return the queues that are received from; nothing where queues do not come and go."""

    async def add_queue(self, spec: QueueSpec) -> None:
        """Declare a queue and receive from it too."""

    async def cancel_queue(self, name: str) -> None:
        """Receive from a queue no longer."""

    async def cancel(self) -> None:
        """Stop receiving; nothing new arrives after it returns. Settling goes on."""

    async def close(self) -> None:
        """Close the connection; what is not settled goes back to the broker."""


class Holder(Protocol):
    """What a consumer has for its lease: the messages that it holds, by the broker's names for them."""

    def held_fields(self) -> list[str]:
        """Return what is held, the last one first."""

    async def give_back(self, fields: Sequence[str], counted: bool = True) -> int:
        """Put messages back into their queues, the last one first; return how many were still there."""

    def go_on(self, is_trusted: bool) -> None:
        """The doubt is over: carry out what waited for it; nothing of it when others have taken over."""


class Lease(Protocol):
    """What messages are held under where a broker does not see its consumers go: taken, renewed, lost, ended."""

    #: Who holds them.
    owner: str

    async def take(self, holder: Holder) -> None:
        """Hold messages from now on."""

    async def renew(self) -> None:
        """Say that this worker lives. Raises ConnectionLost when it was taken for dead: what it held is others'."""

    def is_in_doubt(self) -> bool:
        """Whether it may be lost already, so that verdicts have to wait; the holder is told to ``go_on``."""

    async def end(self, is_certain: bool) -> None:
        """Hold nothing more. Not ``is_certain``: there may be messages that the holder never heard of."""


class Clock(Protocol):
    """The worker's Lamport clock; ``fastq.worker.remote.clock.LamportClock`` is one."""

    def forward(self) -> int:
        """Count one step, before something is sent, and return the new value."""


class Bus(Protocol):
    """The worker's side of remote control and events: one connection, on the running loop, until it is ``lost``."""

    lost: asyncio.Future[Exception]
    #: Events and replies that were dropped because the broker took nothing.
    dropped: int

    async def open(self, hostname: str, on_request: OnRequest | None) -> None:
        """Connect, declare, and listen for requests unless ``on_request`` is None.

        Raises ConnectionLost (try again) or SettingsError.
        """

    def reply(self, exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send a worker's reply to the queue that a request has named."""

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send an event, or a list of them, to whoever listens; never waits. Raises ConnectionLost."""

    async def ask(self, method: str, arguments: Mapping[str, Any], timeout_s: float) -> list[Reply]:
        """Ask every node and return the replies that come in time, our own among them. Raises ConnectionLost."""

    async def close(self) -> None:
        """Send what was written and close; ``lost`` ends too."""


class BlockingBus(Protocol):
    """The client's side of remote control and events, for one thread; it connects at its first use."""

    def ask(
        self,
        method: str,
        arguments: Mapping[str, Any],
        timeout_s: float,
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> Iterator[Reply]:
        """Send a command and yield each node's reply, until the time is up or all of the destination have replied."""

    def tell(
        self,
        method: str,
        arguments: Mapping[str, Any],
        destination: Sequence[str] = (),
        pattern: str = "",
        matcher: str = "",
    ) -> None:
        """Send a command that nobody need reply to."""

    def events(self) -> Iterator[BusMessage]:
        """Subscribe to every event, at once, and return an iterator over what is published from now on.

        It blocks until something comes, and raises ConnectionLost at the end.
        """

    def publish_event(self, routing_key: str, headers: Mapping[str, Any], body: bytes) -> None:
        """Send an event, or a list of them, to whoever listens; nobody confirms it. Raises ConnectionLost."""

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""


class ChildHooks(Protocol):
    """What the message loop tells of children: to the pool, which has them. None may raise (``guard``)."""

    def child_ready(self, child: Child) -> None:
        """A child takes calls."""

    def child_full(self, child: Child) -> None:
        """A child was given its last call."""

    def child_drained(self, child: Child) -> None:
        """A child has finished its last call."""

    def child_broken(self, child: Child, reason: str) -> None:
        """A child does not make sense any more."""


class CallHooks(Protocol):
    """What the message loop tells and asks of calls. Nothing here runs for one that simply succeeds, unless somebody
    wants to know (``Core.wants_received``, ``Core.wants_outcomes``). None may raise (``guard``)."""

    def received(self, name: str, task_id: str, delivery: Delivery) -> bool:
        """A task message was admitted. True: it is to wait until ``Core.proceed``."""

    def handed(self, delivery: Delivery) -> None:
        """A message of a task whose messages are handed over is here: ``Core.judge`` says what becomes of it."""

    def started(self, task_id: str, pid: int) -> None:
        """A call has started."""

    def accepted(self, delivery: Delivery, pid: int) -> None:
        """A call that the main process has made has started."""

    def finished(self, name: str, task_id: str, state: str, report: str | None, runtime_s: float) -> None:
        """A call has ended; ``report`` is what the child says to monitors."""

    def reported(self, delivery: Delivery, state: str, report: bytes | None) -> None:
        """A child's outcome is for the main process: ``Core.recorded`` when it is dealt with."""

    def foreign(self, props: bytes, body: bytes) -> tuple[bytes, bytes] | None:
        """Return properties and body of a message of an older form, in today's; None when it is none."""

    def refused(self, reason: str, queue: bytes, props: bytes, body: bytes) -> None:
        """A message was rejected because it is not a task message, or none that this worker takes."""

    def failure(
        self, kind: str, name: str, task_id: str, detail: Any, delivery: Delivery
    ) -> tuple[str, bytes | None] | None:
        """Return the state and the encoded result of a delivery that no child can end.

        None: it is recorded elsewhere, and ``Core.recorded`` called when that is done.
        """

    def unaddressed(self, task_id: str, meta: bytes, delivery: Delivery) -> None:
        """A result is to reach a sender who gave no address; ``Core.confirmed`` when that was tried."""

    def unsendable(self, task_id: str, queue: str, reason: str) -> None:
        """A result or a message of a task has no form that the broker takes."""

    def unconfirmed(self, name: str, task_id: str) -> None:
        """A message that a task sent was refused by the broker: the task runs again."""

    def result_lost(self, name: str, task_id: str) -> None:
        """A result can be neither stored nor kept, as too many wait for the store already."""

    def cancelled(self, name: str, task_id: str, delivery: Delivery) -> None:
        """A call was ended because its connection is gone: the broker gives it out again."""

    def hard_limit(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """A call ran past its hard limit: its process is to be killed."""

    def terminate(self, child: Child, signum: int) -> None:
        """The call that a child runs was revoked: its process is to get the signal, and to end."""

    def overdue(self, child: Child, name: str, task_id: str, limit: float) -> None:
        """One of several calls of a child ran past its hard limit: it is told to end."""

    def hopeless(self, child: Child, why: str) -> None:
        """A child of several calls is to be killed for the sake of one of them, or because its loop stands still."""

    def stalled(self, child: Child, seconds: float) -> None:
        """The loop of a child of several calls has taken no turn for so long."""
