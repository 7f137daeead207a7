"""The one place where messages leave a process: publisher, envelopes, batches, and what is tried again.

Opens its publisher and result store when they are first needed, from the URLs in the settings; both can be set instead.
An application and its tasks share one; neither is known here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from fastq.errors import ConnectionLost, FastqError, NotRegistered, PublishError, ResultsDisabled
from fastq.net import forks
from fastq.request import current, running_message
from fastq.result import AsyncResult, Collected, ResultSource
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
    """What a thread has collected in ``app.batch()``."""

    messages: list[Message] = field(default_factory=list)


class _Thread(threading.local):
    """A thread's batch; None outside of one."""

    batch: Batch | None = None


class Sender:
    """Sends the calls of one application, from any thread and in forked children. Handles get ``source``."""

    def __init__(self, settings: Settings, tasks: Mapping[str, Sendable], source: ResultSource) -> None:
        self.conf = settings
        self._tasks = tasks
        self._source = source
        self._lock = threading.RLock()
        self._thread = _Thread()
        self._envelopes: Envelopes | None = None
        self._named: dict[str, Envelope] = {}
        self._publisher: Publisher | None = None
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
        if options and name not in self._named:  # checked before a connection is opened for the reply address
            self.envelopes.with_options(self.envelopes.of_name(name), options)
        envelope = self._envelope_of(name, args, kwargs)
        if options:
            envelope = self.envelopes.with_options(envelope, options)
        task_id = options.get("task_id")
        return self.send(envelope, new_id() if task_id is None else text_option("task_id", task_id), args, kwargs)

    def send(
        self, envelope: Envelope, task_id: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AsyncResult[Any]:
        """Publish one call and return the handle on its result; ``delay`` and all its relatives end here."""
        parent = None if current() is None else running_message()
        message = envelope.message(task_id, args, kwargs, parent)
        batch = self._thread.batch
        if batch is None:
            self._publish((message,), envelope.publish_retry)
        else:
            batch.messages.append(message)
        sent: AsyncResult[Any] = AsyncResult(task_id, self._source, envelope.name, envelope.ignore_result, batch)
        if parent is not None:
            parent.children.append(sent)
        return sent

    def publish(self, messages: Sequence[Message], retry: PublishRetry | None = None) -> None:
        """Return when the broker has confirmed the messages, or when this thread's batch has them.

        What was lost with its connection or refused is sent again by the retry policy, then raised; what was confirmed
        never, nor what has only not been confirmed in time. ``fastq_publish_timeout`` is for all attempts together.
        """
        batch = self._thread.batch
        if batch is not None:
            batch.messages.extend(messages)
        else:
            self._publish(messages, retry)

    def _publish(self, messages: Sequence[Message], retry: PublishRetry | None) -> None:
        attempt, left = 0, messages
        deadline = time.monotonic() + self.conf.fastq_publish_timeout
        while True:
            try:
                self._publish_once(left, deadline)
                break
            except (ConnectionLost, PublishError) as error:
                policy = self.envelopes.default_retry if retry is None else retry
                if policy.max_retries is not None and attempt >= policy.max_retries:
                    raise
                if isinstance(error, PublishError) and error.again is not None:
                    if not error.again:
                        raise
                    left = cast("Sequence[Message]", error.again)
                pause_s = policy.pause_s(attempt)
                if time.monotonic() + pause_s >= deadline:
                    raise
            time.sleep(pause_s)
            attempt += 1
            # What the broker's restart has ended is there again before a worker can answer.
            with suppress(FastqError):
                self._reply_address(deadline)
        if self._sent is not None:
            self._sent.tell(messages)

    def _publish_once(self, messages: Sequence[Message], deadline: float) -> None:
        publisher = self._publisher or self.publisher
        declared = self._declared
        for message in messages:
            if not message.exchange and message.routing_key not in declared:
                self._declare(publisher, message.routing_key, deadline)
        publisher.publish(messages, deadline)

    def _declare(self, publisher: Publisher, queue: str, deadline: float) -> None:
        if self.conf.task_create_missing_queues or queue == self.conf.task_default_queue:
            publisher.declare(queue, deadline)
        self._declared.add(queue)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Collect what this thread sends inside the ``with`` block and publish it at the end, with one wait for all.

        After an exception in the block nothing is published, and who waits for its results is told so. Inside another
        batch, it joins that one.
        """
        thread = self._thread
        if thread.batch is not None:
            yield
            return
        thread.batch = batch = Batch()
        try:
            yield
        except BaseException as error:
            _drop(batch, error)
            raise
        finally:
            thread.batch = None
        messages, batch.messages = batch.messages, []  # who keeps a handle keeps the batch
        if messages:
            self._publish(messages, None)

    def is_collected(self, task_id: str) -> bool:
        """Return whether a call waits for the end of this thread's ``batch``."""
        batch = self._thread.batch
        return batch is not None and any(message.id == task_id for message in batch.messages)

    # --- envelopes ---------------------------------------------------------------------------------------------------

    @property
    def envelopes(self) -> Envelopes:
        """Return what makes this application's messages; finalizes it."""
        if self._envelopes is None:
            self.finalize()
        return cast("Envelopes", self._envelopes)

    def envelope_of_task(self, task: Addressed, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Envelope:
        """Return the envelope for one call of a task; it holds for all its calls if ``envelopes.routes_are_static``."""
        return self._addressed(self.envelopes.of_task(task, args, kwargs))

    def _envelope_of(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Envelope:
        envelope = self._named.get(name)
        if envelope is not None:
            return envelope
        envelopes = self.envelopes
        envelope = self._addressed(envelopes.routed(envelopes.of_name(name), args, kwargs, self._tasks.get(name)))
        if envelopes.routes_are_static:
            if len(self._named) >= _MAX_NAMED_ENVELOPES:
                self._named.clear()
            self._named[name] = envelope
        return envelope

    def _addressed(self, envelope: Envelope) -> Envelope:
        envelope.reply_to = None if envelope.ignore_result else self._reply_address()
        return envelope

    def _reply_address(self, deadline: float | None = None) -> str | None:
        """Return where workers send results to, None when the store needs no address."""
        running = running_message()
        if not self.stores_results or (running is not None and running.call is not None):
            return None  # a task in a worker does not wait for results, and its process has no connections
        return self.store.reply_address(deadline)

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
    def publisher(self) -> Publisher:
        """Return the connection to the broker, opened at first use."""
        if self._publisher is None:
            self.finalize()
            with self._lock:
                if self._publisher is None:
                    from fastq.brokers import open_publisher

                    self._publisher = open_publisher(cast("str", self.conf.broker_url), self.conf)
        return self._publisher

    @publisher.setter
    def publisher(self, publisher: Publisher | None) -> None:
        self._publisher = publisher
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
                raise ResultsDisabled("this application stores no results; name a store: FastQ(backend='rpc://')")
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
        kept = self._publisher, self._store, self._declared
        self._publisher, self._store, self._declared = None, None, set()
        try:
            yield
        finally:
            self.close()
            self._publisher, self._store, self._declared = kept

    def close(self) -> None:
        """Close the connections; a later use opens new ones."""
        with self._lock:
            store, publisher = self._store, self._publisher
            self._store = self._publisher = None
        if self._sent is not None:
            self._sent.close()
        if store is not None:
            store.close()
        if publisher is not None:
            publisher.close()

    def after_fork(self) -> None:
        """Drop what belongs to the parent process; called in every forked child."""
        self._lock = threading.RLock()
        self._thread.batch = None
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
