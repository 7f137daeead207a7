"""A consumer on an event loop of its own, in a thread, behind a sink of the test's: what every broker is driven by.

Everything goes through the seam, as from the message loop: the window asks for messages, verdicts make room for more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import uvloop

from fastq.brokers import open_consumer
from fastq.interfaces import Consumer
from fastq.link import Delivery
from fastq.settings import Settings
from fastq.tap import Tap
from fastq.wire.message import Message
from tests.support.consumer_in_thread import TIMEOUT_S, LoopInThread

QUIET_S = 0.25  # nothing more comes when nothing has come for so long


@dataclass(frozen=True)
class Arrived:
    """A delivery, and what came with it."""

    delivery: Delivery
    queue: str
    props: bytes
    body: bytes
    #: How often it was handed out, this time included.
    deliveries: int


class TappedConsumer(LoopInThread):
    """One open consumer. At most ``window`` messages are here unsettled."""

    def __init__(self, url: str, settings: Settings, queues: Sequence[str] = ("celery",), window: int = 100) -> None:
        super().__init__(uvloop.new_event_loop)
        self.consumer: Consumer = open_consumer(url, settings, None)
        self._changed = threading.Condition()
        self._all: list[Arrived] = []
        self._confirmed: list[tuple[Delivery, bool]] = []
        self._tap = Tap(self._on_batch)
        try:
            self.run(self._open(queues, window))
        except BaseException:
            self.stop_loop()
            raise

    async def _open(self, queues: Sequence[str], window: int) -> None:
        await self.consumer.open()
        self.consumer.source.window = window if queues else 0
        self._tap.attach(self.consumer.source)
        self._tap.attach(self.consumer.outlet)
        if queues:
            await self.consumer.consume(queues, window)
        self._flush()

    def _on_batch(self) -> None:
        """What the message loop does after each batch: take it, and ask for more where there is room."""
        with self._changed:
            for delivery in self._tap.received[len(self._all) :]:
                found = delivery.describe()
                self._all.append(
                    Arrived(delivery, found["routing_key"], found["props"], found["body"], found["deliveries"])
                )
            self._confirmed = list(self._tap.confirmed)
            self._changed.notify_all()
        self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._tap.flush(self.consumer.source)
        self._tap.flush(self.consumer.outlet)

    # --- what has come

    def arrived(self, count: int, timeout_s: float = TIMEOUT_S) -> list[Arrived]:
        """Wait for ``count`` deliveries in all and return all that have come, oldest first."""
        self._wait(lambda: len(self._all) >= count, timeout_s)
        return list(self._all)

    def bodies(self, count: int, timeout_s: float = TIMEOUT_S) -> list[str]:
        """As ``arrived``, the bodies alone."""
        return [each.body.decode() for each in self.arrived(count, timeout_s)]

    def so_far(self) -> list[Arrived]:
        """Return all that has come by now."""
        return list(self._all)

    def until(self, is_enough: Callable[[list[Arrived]], bool]) -> list[Arrived]:
        """Wait until what has come is enough and return it."""
        self._wait(lambda: is_enough(self._all), TIMEOUT_S)
        return list(self._all)

    def all(self) -> list[Arrived]:
        """Return all that has come, and comes in the next moment."""
        count = -1
        while count != len(self._all):
            count = len(self._all)
            time.sleep(QUIET_S)
        return list(self._all)

    def fate(self, owner: Arrived, count: int = 1) -> list[bool]:
        """Wait until so many of an owner's messages or results have a fate, and return whether each is stored."""

        def told() -> list[bool]:
            return [stored for delivery, stored in self._confirmed if delivery is owner.delivery]

        self._wait(lambda: len(told()) >= count, TIMEOUT_S)
        return told()

    def _wait(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        with self._changed:
            ended = self._changed.wait_for(is_done, timeout_s)
        assert ended, f"after {timeout_s} s: {len(self._all)} deliveries, {len(self._confirmed)} confirmations"

    # --- what becomes of it

    def settle(self, verdict: int, *settled: Arrived) -> None:
        """Tell the verdict on deliveries, in one batch."""

        def settle() -> None:
            for each in settled:
                self._tap.tell(each.delivery, verdict)
            self._flush()

        self.call(settle)

    def publish(self, owner: Arrived | None, *messages: Message) -> None:
        """Publish follow-ups of a delivery, in one batch; of nobody's when there is no owner."""

        def publish() -> None:
            for message in messages:
                self._tap.send(self.consumer.outlet, message, None if owner is None else owner.delivery)
            self._flush()

        self.call(publish)

    def save(self, owner: Arrived | None, *results: tuple[str, str, bytes]) -> None:
        """Save results (task id, state, meta), in one batch."""

        def save() -> None:
            for task_id, state, meta in results:
                source: Any = self.consumer.source
                self._tap.save(source, None if owner is None else owner.delivery, task_id, state, meta)
            self._flush()

        self.call(save)

    @property
    def held(self) -> int:
        """How many deliveries are here unsettled."""
        return self.consumer.source.held

    def set_prefetch(self, prefetch: int) -> None:
        """Change the window, as the worker does."""

        async def change() -> None:
            self.consumer.source.window = prefetch
            await self.consumer.set_prefetch(prefetch)
            self._flush()

        self.run(change())

    # --- its life

    def cancel(self) -> None:
        self.run(self.consumer.cancel())

    def lost(self, timeout_s: float = TIMEOUT_S) -> Exception:
        """Wait for the connection to be lost and return why."""

        async def wait() -> Exception:
            error: Exception = await self.consumer.lost
            return error

        return self.run(wait(), timeout_s)

    def close(self) -> None:
        """Close the consumer and end the loop; does nothing the second time."""
        if self.is_running:
            try:
                self.run(self.consumer.close())
            finally:
                self.stop_loop()

    def __enter__(self) -> TappedConsumer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
