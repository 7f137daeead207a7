"""What the task API sees of the outside in a child: a Publisher and a ResultStore that hand all to the main process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from fastq.brokers.limits import check_sizes
from fastq.errors import PublishError
from fastq.interfaces import Meta, Publisher, ResultStore, Unwatch
from fastq.wire.message import Message
from fastq.wire.pipe import ChildPipe

T = TypeVar("T")


class PipePublisher:
    """The child's Publisher: the main process confirms the messages before it settles the running call."""

    def __init__(self, pipe: ChildPipe, max_message_bytes: int) -> None:
        self._pipe = pipe
        self._max_message_bytes = max_message_bytes

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Hand the messages to the main process. Raises PublishError for one that no worker would take."""
        check_sizes(messages, self._max_message_bytes)
        for message in messages:
            self._pipe.publish(message)

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Nothing to do: the main process declares what it publishes to."""

    def purge(self, queue: str) -> int:
        """Raise PublishError: this process has no connection."""
        raise PublishError("queues cannot be purged from inside a task; use `fastq purge`")

    def depth(self, queue: str) -> int:
        """Raise PublishError: this process has no connection."""
        raise PublishError("queue depths cannot be read from inside a task")

    def close(self) -> None:
        """Nothing to do: the pipe lives as long as the child."""

    def on_loop(self) -> LoopPipePublisher:
        """Return its form for tasks that are coroutines."""
        return LoopPipePublisher(self)


class LoopPipePublisher:
    """The child's AsyncPublisher: the messages are handed over at once, so they belong to the call that sends them."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Hand the messages to the main process, without a turn of the loop."""
        self._publisher.publish(messages, deadline)

    async def declare(self, queue: str, deadline: float | None = None) -> None:
        """Nothing to do: the main process declares what it publishes to."""

    async def close(self) -> None:
        """Nothing to do: the pipe lives as long as the child."""


class PipeStore:
    """The child's ResultStore: states go to the main process, the rest to a store of its own, opened at first use."""

    def __init__(self, pipe: ChildPipe, open_store: Callable[[], ResultStore]) -> None:
        self._pipe = pipe
        self._open = open_store
        self._store: ResultStore | None = None

    @property
    def _own(self) -> ResultStore:
        if self._store is None:
            self._store = self._open()
        return self._store

    def reply_address(self, deadline: float | None = None) -> str | None:
        """Return the own store's address."""
        return self._own.reply_address(deadline)

    def is_there(self) -> bool:
        """Return whether the own store was reached."""
        return self._store is not None and self._store.is_there()

    def load(self, task_id: str) -> Meta | None:
        """Ask the own store."""
        return self._own.load(task_id)

    def wait(self, task_id: str, timeout_s: float | None) -> Meta:
        """Wait at the own store."""
        return self._own.wait(task_id, timeout_s)

    def watch(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Watch at the own store."""
        return self._own.watch(task_id, callback)

    def observe(self, task_id: str, callback: Callable[[Meta], None]) -> Unwatch:
        """Observe at the own store."""
        return self._own.observe(task_id, callback)

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Hand the state to the main process."""
        self._pipe.state(task_id, state, meta)

    def forget(self, task_id: str) -> None:
        """Forget at the own store."""
        self._own.forget(task_id)

    def close(self) -> None:
        """Close the own store if it was opened."""
        if self._store is not None:
            self._store.close()


class Once(Generic[T]):
    """Opens something when it is first asked for, from whatever thread, unless it is open already."""

    def __init__(self, open_it: Callable[[], T], value: T | None = None) -> None:
        self.value = value
        self._open = open_it
        self._lock = threading.Lock()

    def __call__(self) -> T:
        """Return it."""
        with self._lock:
            if self.value is None:
                self.value = self._open()
            return self.value


class ThreadPublisher:
    """What the thread sends that made this goes through its pipe; what others send, by a Publisher of their own."""

    def __init__(self, pipe: Publisher, own: Once[Publisher]) -> None:
        self._thread = threading.get_ident()
        self._pipe = pipe
        self._own = own

    @property
    def _publisher(self) -> Publisher:
        return self._pipe if threading.get_ident() == self._thread else self._own()

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Hand the messages to the main process, or return when the broker has them. Raises PublishError."""
        self._publisher.publish(messages, deadline)

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Declare a queue, where that is this thread's affair."""
        self._publisher.declare(queue, deadline)

    def purge(self, queue: str) -> int:
        """Empty a queue. Raises PublishError inside a task."""
        return self._publisher.purge(queue)

    def depth(self, queue: str) -> int:
        """Count a queue's messages. Raises PublishError inside a task."""
        return self._publisher.depth(queue)

    def close(self) -> None:
        """Close the others' Publisher, if it was opened."""
        if self._own.value is not None:
            self._own.value.close()

    def on_loop(self) -> LoopPipePublisher:
        """Return its form for tasks that are coroutines: those run in the thread of the call."""
        return LoopPipePublisher(self)


class ThreadStore(PipeStore):
    """A PipeStore for the thread that made it; what others store goes to the own store."""

    def __init__(self, pipe: ChildPipe, open_store: Callable[[], ResultStore]) -> None:
        super().__init__(pipe, open_store)
        self._thread = threading.get_ident()

    def save(self, task_id: str, state: str, meta: bytes) -> None:
        """Hand the state to the main process, or to the store."""
        if threading.get_ident() == self._thread:
            super().save(task_id, state, meta)
        else:
            self._own.save(task_id, state, meta)
