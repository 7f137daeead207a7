"""A consumer on an event loop of its own, in a thread, without a core: the test decides about what it brings."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastq.brokers import open_consumer
from fastq.brokers.redis.consumer import RedisConsumer
from fastq.settings import Settings
from fastq.wire.message import Message

T = TypeVar("T")
Row = tuple[int, bytes, bytes, bytes, int]

ACK, REJECT, REQUEUE = 0, 1, 2
TIMEOUT_S = 10.0


class Record:
    """What a source has brought, with a condition to wait for more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.rows: list[Row] = []
        self.batches: list[int] = []  # how many rows came at a time
        self.stored: list[int] = []
        self.refused: list[tuple[int, str]] = []

    def add(self, name: str, items: Sequence[Any]) -> None:
        with self._changed:
            getattr(self, name).extend(items)
            self._changed.notify_all()

    def wait(self, done: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        with self._changed:
            ended = self._changed.wait_for(done, timeout_s)
        assert ended, f"after {timeout_s} s: {len(self.rows)} rows, stored {self.stored}, refused {self.refused}"


class _Recording:
    """Comes before a source class: keeps what would go to the core."""

    record: Record

    def receive(self, rows: list[Row]) -> None:
        self.record.add("batches", [len(rows)])
        self.record.add("rows", rows)

    def published(self, tokens: list[int]) -> None:
        self.record.add("stored", tokens)

    def publish_failed(self, tokens: list[int], reason: str) -> None:
        self.record.add("refused", [(token, reason) for token in tokens])


class LoopInThread:
    """An event loop in a thread of its own."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop) -> None:
        self.loop = new_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = TIMEOUT_S) -> T:
        """Return what a coroutine returns on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def call(self, function: Callable[..., T], *args: object) -> T:
        """Return what a function returns on the loop's thread."""

        async def call() -> T:
            return function(*args)

        return self.run(call())

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop_loop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_S)
        self.loop.close()


class Consuming(LoopInThread):
    """One open consumer. ``window`` messages may be on their way; ``allow`` asks for more."""

    def __init__(self, url: str, settings: Settings, queues: Sequence[str] = ("celery",), window: int = 100) -> None:
        super().__init__()
        self.record = Record()
        self.consumer: Any = open_consumer(url, settings, None)
        bases = (_Recording, self.consumer.source_class)
        self.consumer.source_class = type("RecordingSource", bases, {"record": self.record})
        try:
            self.run(self.consumer.open())
            if queues:
                self.run(self.consumer.consume(queues, window))
        except BaseException:
            self.stop_loop()
            raise

    def __enter__(self) -> Consuming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def rows(self, count: int, timeout_s: float = TIMEOUT_S) -> list[Row]:
        """Wait for ``count`` deliveries in all and return all that have come."""
        self.record.wait(lambda: len(self.record.rows) >= count, timeout_s)
        return list(self.record.rows)

    def bodies(self, count: int, timeout_s: float = TIMEOUT_S) -> list[bytes]:
        return [row[3] for row in self.rows(count, timeout_s)]

    def allow(self, count: int) -> None:
        self.call(self.consumer.source.pull, count)

    def settle(self, verdict: int, *tags: int) -> None:
        self.call(self.consumer.source.settle, [(tag, verdict) for tag in tags])

    def save(self, *results: tuple[str, str, bytes, str, int]) -> None:
        self.call(self.consumer.source.save, list(results))

    def publish(self, *messages: tuple[int, Any]) -> None:
        self.call(self.consumer.source.publish, list(messages))

    def stored(self, token: int) -> None:
        """Wait for the confirmation of a token."""
        self.record.wait(lambda: token in self.record.stored)

    def fence(self) -> None:
        """Wait until everything handed over so far is stored."""
        if isinstance(self.consumer, RedisConsumer):
            self.run(self.consumer.settled())
            return
        if self.consumer.saves_results:
            self.save(("fence", "STARTED", b'{"status":"STARTED"}', "", FENCE))
        else:
            self.publish((FENCE, Message("", "fence", b"", b"")))
        self.record.wait(lambda: FENCE in self.record.stored)
        self.record.stored.remove(FENCE)

    def lost(self, timeout_s: float = TIMEOUT_S) -> Exception:
        """Wait for the connection to be lost and return why."""

        async def wait() -> Exception:
            error: Exception = await self.consumer.lost
            return error

        return self.run(wait(), timeout_s)

    def close(self) -> None:
        """Close the consumer and end the loop."""
        if self.is_running:
            try:
                self.run(self.consumer.close())
            finally:
                self.stop_loop()


FENCE = 1 << 60


def within(seconds: float, done: Callable[[], bool]) -> bool:
    """Return whether something becomes true in time; looks every 5 ms, for what nothing announces."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
