"""The broker in this process: for tests, examples, and a worker whose loop runs in a thread beside its producers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastq.brokers.fixed import FixedQueues
from fastq.brokers.limits import check_sizes
from fastq.brokers.memory.space import Space, find_space
from fastq.errors import PublishError, SettingsError
from fastq.link import ACK, REJECT, REQUEUE, RETURN, BatchSource

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import SaveItem
    from fastq.settings import Settings
    from fastq.wire.message import Message


class MemoryPublisher:
    """Publishes to a space of this process."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._space = find_space(url)
        self._max_message_bytes = settings.fastq_max_message_bytes

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Store the messages and wake the workers."""
        check_sizes(messages, self._max_message_bytes)
        try:
            self._space.publish(messages)
        except SettingsError as error:
            raise PublishError(f"not published: {error}") from error

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing."""
        self._space.declare(queue)

    def purge(self, queue: str) -> int:
        """Drop the messages that wait in a queue, delayed ones too, and return how many there were."""
        return self._space.purge(queue)

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, delayed ones too."""
        return self._space.depth(queue)

    def close(self) -> None:
        """Do nothing: what was published stays."""


class MemorySource(BatchSource):
    """The hot half. Runs on the loop's thread; what it brings comes with a turn of the loop, never within a call."""

    def __init__(self, space: Space, loop: asyncio.AbstractEventLoop, expires_s: float | None) -> None:
        super().__init__()
        self._space = space
        self._loop = loop
        self._expires_s = expires_s
        self._queues: tuple[str, ...] = ()
        self._limit = 0
        self._taken = 0
        self._alarm: asyncio.TimerHandle | None = None
        space.listen(self._wake)

    def start(self, queues: Sequence[str]) -> None:
        """Receive from these queues."""
        self._queues = tuple(queues)
        self._loop.call_soon(self._claim)

    def stop(self) -> None:
        """Receive nothing more."""
        self._queues = ()
        if self._alarm is not None:
            self._alarm.cancel()

    def close(self) -> None:
        """Give back what is not settled."""
        self.stop()
        self._space.unlisten(self._wake)
        self._space.give_back_all(self)

    def pull(self, n: int) -> None:
        """Allow ``n`` more deliveries."""
        self._limit = self._taken + n
        self._loop.call_soon(self._claim)

    def settle(self, batch: list[tuple[int, int]]) -> None:
        """Carry out the verdicts on deliveries."""
        self._space.delete([tag for tag, verdict in batch if verdict == ACK])
        for reason, tags in self.take_reasons([tag for tag, verdict in batch if verdict == REJECT]).items():
            self._space.bury(tags, reason)
        for verdict, uncounted in ((REQUEUE, 0), (RETURN, 1)):
            tags = [tag for tag, each in batch if each == verdict]
            if tags:
                self._space.give_back(tags, uncounted)

    def save(self, batch: list[SaveItem]) -> None:
        """Store results."""
        for task_id, state, meta, _, _ in batch:
            self._space.save(task_id, state, meta, self._expires_s)
        tokens = [token for *_, token in batch if token]
        if tokens:
            self._loop.call_soon(self.published, tokens)

    def publish(self, batch: list[tuple[int, Message]]) -> None:
        """Store messages."""
        self._space.publish([message for _, message in batch])
        self._loop.call_soon(self.published, [token for token, _ in batch])

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._claim)

    def _claim(self) -> None:
        wanted = self._limit - self._taken
        if not self._queues or wanted <= 0 or self.dead:
            return
        rows = [
            (held.id, held.queue.encode(), held.props, held.body, held.deliveries)
            for held in self._space.claim(self, self._queues, wanted)
        ]
        if len(rows) < wanted:
            self._set_alarm()
        if rows:
            self._taken += len(rows)
            self.receive(rows)

    def _set_alarm(self) -> None:
        """Look again when the next delayed message is due."""
        if self._alarm is not None:
            self._alarm.cancel()
        due = self._space.next_due()
        self._alarm = None if due is None else self._loop.call_later(max(0.0, due - time.time()), self._claim)


class MemoryConsumer(FixedQueues):
    """A worker's side of a space. Without ``consume`` it only stores results and publishes."""

    source: MemorySource
    outlet: MemorySource
    lost: asyncio.Future[Exception]
    name = ""
    source_class = MemorySource

    saves_results = True
    replies = None

    def __init__(self, url: str, settings: Settings, core: Core | None = None) -> None:
        self._space = find_space(url)
        self._expires_s = settings.result_expires

    async def open(self) -> None:
        """Connect, which always succeeds."""
        loop = asyncio.get_running_loop()
        self.lost = loop.create_future()
        self.source = self.outlet = self.source_class(self._space, loop, self._expires_s)

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Receive from the queues, which are created when missing."""
        for queue in queues:
            self._space.declare(queue)
        self.source.window = prefetch
        self.source.start(queues)
        self.source.pull(prefetch)

    async def set_prefetch(self, prefetch: int) -> None:
        """Change how many unsettled messages may be here."""
        self.source.window = prefetch

    async def cancel(self) -> None:
        """Receive nothing more."""
        self.source.stop()

    async def close(self) -> None:
        """Give back what is not settled."""
        self.source.close()
