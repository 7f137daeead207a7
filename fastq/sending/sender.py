"""The one place where messages leave a process: publisher, envelopes, batches, and what is tried again.

Opens its publisher and result store when they are first needed, from the URLs in the settings; both can be set instead.
An application and its tasks share one; neither is known here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastq.errors import ConnectionLost, FastqError, NotRegistered, PublishError, ResultsDisabled
from fastq.net import forks
from fastq.request import Request, current, is_in_worker, running_message
from fastq.result import AsyncResult, Collected, ResultSource
from fastq.sending.attempts import Attempts
from fastq.sending.envelope import Addressed, Envelope, Envelopes, PublishRetry
from fastq.sending.options import SendOptions, text_option
from fastq.settings import Settings
from fastq.wire.ids import new_id

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastq.interfaces import Publisher, ResultStore
    from fastq.sending.sent import SentEvents
    from fastq.wire.message import Message

_MAX_NAMED_ENVELOPES = 1024  # chosen: send_task with made-up names must not grow without bound


class Sendable(Addressed, Protocol):
    """What a sender needs of a task."""

    def settle(self, settings: Settings) -> None:
        """Take from the settings what the task does not say itself."""

    def forget_envelope(self) -> None:
        """Prepare the next message anew."""

    def apply_async(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], /, **options: Unpack[SendOptions]
    ) -> AsyncResult[Any]:
        """Send or, with ``task_always_eager``, run the task."""


@dataclass(slots=True)
class Batch(Collected):
    """What was collected in ``app.batch()``."""

    messages: list[Message] = field(default_factory=list)
    #: The block has not ended. A coroutine that was started in it may outlive it, and then sends by itself.
    is_open: bool = True

    def take(self) -> list[Message]:
        """Return the messages and keep them no longer: who keeps a handle keeps the batch."""
        messages, self.messages = self.messages, []
        return messages


class Sender:
    """Sends the calls of one application, from any thread and in forked children. Handles get ``source``."""

    def __init__(self, settings: Settings, tasks: Mapping[str, Sendable], source: ResultSource) -> None:
        self.conf = settings
        self._tasks = tasks
        self._source = source
        self._lock = threading.RLock()
        # Of this thread, greenlet or coroutine, and of coroutines that were started in the block.
        self._batch: ContextVar[Batch | None] = ContextVar("fastq_batch", default=None)
        self._envelopes: Envelopes | None = None
        self._named: dict[str, Envelope] = {}
        self._publisher: Publisher | None = None
        #: The publisher that was set, in place of one that is opened; the child of a worker has such a one.
        self.given_publisher: Publisher | None = None
        self._store: ResultStore | None = None
        self._declared: set[str] = set()
        self._sent: SentEvents | None = None
        forks.register(self)

    # --- what is sent ------------------------------------------------------------------------------------------------

    def send_task(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: SendOptions
    ) -> AsyncResult[Any]:
        """Send a call of which only the task's name need be known; the options' names have been checked."""
        if self.conf.task_always_eager:
            task = self._tasks.get(name)
            if task is None:
                raise NotRegistered(
                    f"task {name!r} cannot run here and now (task_always_eager): {self._source!r} has no task of that "
                    "name"
                )
            return task.apply_async(args, kwargs, **options)
        envelope = self._named.get(name)
        if envelope is None:
            envelope = self.new_envelope(name, args, kwargs, options)
            self.keep_envelope(self.addressed(envelope))
        return self.send(*self.with_options(envelope, options), args, kwargs)

    def send(
        self, envelope: Envelope, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AsyncResult[Any]:
        """Publish one call and return the handle on its result; ``delay`` and all its relatives end here."""
        message, parent = self.make(envelope, task_id, args, kwargs)
        batch = self._batch.get()
        if batch is None or not batch.is_open:  # as ``collecting`` has it, without the call
            batch = None
            self._publish((message,), envelope.publish_retry)
        else:
            batch.messages.append(message)
        return self.handle(envelope, task_id, parent, batch)

    def make(
        self, envelope: Envelope, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Message, Request | None]:
        """Return the message of one call, and the running call that sends it if there is one. Raises EncodeError."""
        parent = None if current() is None else running_message()
        return envelope.message(task_id, args, kwargs, parent), parent

    def handle(self, envelope: Envelope, task_id: str, parent: Request | None, batch: Batch | None) -> AsyncResult[Any]:
        """Return the handle on a call that was sent; who sent it has it among its children."""
        sent: AsyncResult[Any] = AsyncResult(task_id, self._source, envelope.name, envelope.ignore_result, batch)
        if parent is not None:
            parent.children.append(sent)
        return sent

    def publish(self, messages: Sequence[Message], retry: PublishRetry | None = None) -> None:
        """Return when the broker has confirmed the messages, or when the batch that is collected here has them.

        What was lost with its connection or refused is sent again by the retry policy, then raised; what was confirmed
        never, nor what has only not been confirmed in time. ``fastq_publish_timeout`` is for all attempts together.
        """
        batch = self.collecting
        if batch is not None:
            batch.messages.extend(messages)
        else:
            self._publish(messages, retry)

    def _publish(self, messages: Sequence[Message], retry: PublishRetry | None) -> None:
        left, attempts = messages, None
        deadline = time.monotonic() + self.conf.fastq_publish_timeout
        while True:
            try:
                self._publish_once(left, deadline)
                break
            except (ConnectionLost, PublishError) as error:
                if attempts is None:
                    attempts = self.attempts(messages, retry, deadline)
                pause_s = attempts.pause_after(error)
                left = attempts.left
            time.sleep(pause_s)
            # What the broker's restart has ended is there again before a worker can answer.
            with suppress(FastqError):
                self._reply_address(deadline)
        if self._sent is not None:
            self._sent.tell(messages)

    def attempts(self, messages: Sequence[Message], retry: PublishRetry | None, deadline: float) -> Attempts:
        """Return the attempts to send messages by a policy, or by the settings'."""
        return Attempts(messages, self.envelopes.default_retry if retry is None else retry, deadline)

    def _publish_once(self, messages: Sequence[Message], deadline: float) -> None:
        publisher = self._publisher or self.publisher
        declared = self._declared
        for message in messages:
            if not message.exchange and message.routing_key not in declared:
                if self.may_declare(message.routing_key):
                    publisher.declare(message.routing_key, deadline)
                self.note_declared(message.routing_key)
        publisher.publish(messages, deadline)

    def is_declared(self, queue: str) -> bool:
        """Return whether this process has declared a queue, or has not to."""
        return queue in self._declared

    def may_declare(self, queue: str) -> bool:
        """Return whether a queue is to be created when it is first used."""
        return bool(self.conf.task_create_missing_queues) or queue == self.conf.task_default_queue

    def note_declared(self, queue: str) -> None:
        """Declare a queue no more."""
        self._declared.add(queue)

    @property
    def tells_sent(self) -> bool:
        """Return whether monitors are told of what is sent here."""
        return self._sent is not None and not is_in_worker()

    def tell_sent(self, messages: Sequence[Message]) -> None:
        """Tell monitors of what was sent."""
        if self._sent is not None:
            self._sent.tell(messages)

    # --- batches -----------------------------------------------------------------------------------------------------

    @property
    def collecting(self) -> Batch | None:
        """Return what collects the calls that are sent here, None outside of a batch."""
        batch = self._batch.get()
        return batch if batch is not None and batch.is_open else None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Collect what is sent inside the ``with`` block and publish it at the end, with one wait for all.

        After an exception in the block nothing is published, and who waits for its results is told so. Inside another
        batch, it joins that one.
        """
        with self.collect() as batch:
            yield
        if batch is not None and (messages := batch.take()):
            self._publish(messages, None)

    @contextmanager
    def collect(self) -> Iterator[Batch | None]:
        """Collect what is sent inside the ``with`` block; None inside another one, which collects it."""
        if self.collecting is not None:
            yield None
            return
        batch = Batch()
        self._batch.set(batch)
        try:
            yield batch
        except BaseException as error:
            _drop(batch, error)
            raise
        finally:
            batch.is_open = False
            self._batch.set(None)

    def is_collected(self, task_id: str) -> bool:
        """Return whether a call waits for the end of the batch that is collected here."""
        batch = self.collecting
        return batch is not None and any(message.id == task_id for message in batch.messages)

    # --- envelopes ---------------------------------------------------------------------------------------------------

    @property
    def envelopes(self) -> Envelopes:
        """Return what makes this application's messages; finalizes it."""
        if self._envelopes is None:
            self.finalize()
        return cast("Envelopes", self._envelopes)

    def known_envelope(self, name: str) -> Envelope | None:
        """Return the envelope of a task of which only the name is known, if it was kept."""
        return self._named.get(name)

    def new_envelope(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: SendOptions) -> Envelope:
        """Return the envelope for one call of such a task; where its result goes is not in it yet.

        The options are checked, before a connection is opened for that address.
        """
        envelopes = self.envelopes
        envelope = envelopes.of_name(name)
        if options:
            envelopes.with_options(envelope, options)
        return envelopes.routed(envelope, args, kwargs, self._tasks.get(name))

    def keep_envelope(self, envelope: Envelope) -> None:
        """Use it for the next calls too, unless a router looks at every call."""
        if self.envelopes.routes_are_static:
            if len(self._named) >= _MAX_NAMED_ENVELOPES:
                self._named.clear()
            self._named[envelope.name] = envelope

    def with_options(self, envelope: Envelope, options: SendOptions) -> tuple[Envelope, str]:
        """Return the envelope with a call's options, and the call's id."""
        task_id = options.get("task_id")
        return (
            self.envelopes.with_options(envelope, options) if options else envelope,
            new_id() if task_id is None else text_option("task_id", task_id),
        )

    def addressed(self, envelope: Envelope) -> Envelope:
        """Return the envelope with where its result is to go."""
        envelope.reply_to = None if envelope.ignore_result else self._reply_address()
        return envelope

    @property
    def wants_replies(self) -> bool:
        """Return whether who sends here may wait for results: a task in a worker does not."""
        return self.stores_results and not is_in_worker()

    def _reply_address(self, deadline: float | None = None) -> str | None:
        """Return where workers send results to, None when the store needs no address."""
        return self.store.reply_address(deadline) if self.wants_replies else None

    def forget_envelopes(self) -> None:
        """Prepare messages anew from the next one on: the reply address or the process has changed."""
        self._named.clear()
        for task in self._tasks.values():
            task.forget_envelope()

    # --- settings ----------------------------------------------------------------------------------------------------

    @property
    def is_final(self) -> bool:
        """Return whether the settings no longer change."""
        return self._envelopes is not None

    def finalize(self) -> None:
        """Settle the configuration; called by the first use."""
        if self._envelopes is not None:
            return
        with self._lock:
            if self._envelopes is None:
                self.conf.freeze()
                self.settle()

    def settle(self) -> None:
        """Take what follows from the settings, for the tasks too; again where they are overridden."""
        self._envelopes = Envelopes(self.conf)
        self._named.clear()
        self._settle_events()
        for task in self._tasks.values():
            task.settle(self.conf)

    def _settle_events(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            sent.close()
        url = str(self.conf.broker_url)
        if not self.conf.task_send_sent_event:
            return
        from fastq.brokers import has_bus
        from fastq.sending.sent import SentEvents

        self._sent = SentEvents(url, self.conf) if has_bus(url) else None

    # --- connections -------------------------------------------------------------------------------------------------

    @property
    def broker_url(self) -> str:
        """Return where the broker is."""
        return cast("str", self.conf.broker_url)

    @property
    def publisher(self) -> Publisher:
        """Return the connection to the broker, opened at first use."""
        if self._publisher is None:
            self.finalize()
            with self._lock:
                if self._publisher is None:
                    from fastq.brokers import open_publisher

                    self._publisher = open_publisher(self.broker_url, self.conf)
        return self._publisher

    @publisher.setter
    def publisher(self, publisher: Publisher | None) -> None:
        self._publisher = self.given_publisher = publisher
        self._declared.clear()

    @property
    def stores_results(self) -> bool:
        """Return whether there is a result store."""
        if self._store is None:
            self.finalize()
        return self._store is not None or self.conf.result_backend != "disabled"

    @property
    def store(self) -> ResultStore:
        """Return the result store, opened at first use. Raises ResultsDisabled when there is none."""
        if self._store is None:
            if not self.stores_results:
                from fastq.results import fitting_backend

                named = fitting_backend(self.broker_url)
                raise ResultsDisabled(f"this application stores no results; name a store: FastQ(backend={named!r})")
            with self._lock:
                if self._store is None:
                    from fastq.results import open_store

                    self._store = open_store(cast("str", self.conf.result_backend), self.conf)
        return self._store

    @store.setter
    def store(self, store: ResultStore | None) -> None:
        self._store = store
        self.forget_envelopes()

    @property
    def opened(self) -> tuple[Publisher | None, ResultStore | None]:
        """Return publisher and store as far as they are open, or were set."""
        return self._publisher, self._store

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Have no connections inside a ``with`` block but those that are opened there."""
        kept = self._publisher, self.given_publisher, self._store, self._declared
        self._publisher, self.given_publisher, self._store, self._declared = None, None, None, set()
        try:
            yield
        finally:
            self.close()
            self._publisher, self.given_publisher, self._store, self._declared = kept

    def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        with self._lock:
            store, publisher = self._store, self._publisher
            self._store = self._publisher = self.given_publisher = None
        if self._sent is not None:
            self._sent.close()
        if store is not None:
            store.close()
        if publisher is not None:
            publisher.close()

    def after_fork(self) -> None:
        """Drop what belongs to the parent process; called in every forked child."""
        self._lock = threading.RLock()
        self._batch.set(None)
        if self._sent is not None:
            self._sent.after_fork()
        self.forget_envelopes()


def _drop(batch: Batch, error: BaseException) -> None:
    """Tell the handles that nothing was sent; a task has no such children."""
    batch.fail(error)
    parent = running_message()
    if parent is not None and parent.spawned:
        dropped = {message.id for message in batch.messages}
        parent.spawned[:] = [child for child in parent.spawned if child.id not in dropped]
    batch.messages.clear()
