"""How many messages a worker holds in advance, and when that changes. Measured in work: 20 ms of it for each child.

RabbitMQ counts what has not been acknowledged: what waits for its time, and what ran and waits for a result store that
is away, fills its windows, so they are widened by as much.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from fastq.errors import FastqError
from fastq.link import BatchSource

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import Consumer
    from fastq.pool import Pool
    from fastq.worker.options import WorkerOptions

UNBOUNDED: Final = 4096  # what "no prefetch limit" means for brokers that are asked for messages
MOST: Final = 1024
MAX_SCHEDULED: Final = 100_000  # reliability rules, section 6.2: beyond this the broker keeps what waits for its time
ADAPT_EVERY_S: Final = 0.2
FIRST_BESIDE: Final = 64
GROW_EVERY_S: Final = 0.02  # while ETA tasks fill the window: 10,000 of them are here within half a second
HOLD_S: Final = 1.0  # a window that ETA tasks have filled is kept open so long
#: Work to hold in advance while tasks are short: hides the acks' way to the broker and back many times over.
WORK_NS: Final = 20e6


class Window:
    """The prefetch of one worker, by its options. ``max_scheduled``: so many may wait here for their time (0: many).

    ``beside``: so many calls may run in the children for coroutine functions.
    """

    def __init__(self, options: WorkerOptions, core: Core, pool: Pool, max_scheduled: int, beside: int = 0) -> None:
        self._options = options
        self._core = core
        self._pool = pool
        self._max_scheduled = max_scheduled or MAX_SCHEDULED
        self._beside = beside
        self._more = 0

    def widen(self, n: int) -> None:
        """Hold so many messages more in advance from now on, or fewer, as the application's own code asks for."""
        self._more = max(self._more + n, 1 - self._base)

    @property
    def size(self) -> int:
        """Return how many messages may be here at first."""
        multiplier = self._options.prefetch_multiplier
        return UNBOUNDED if multiplier == 0 else max(1, self._base + self._more)

    @property
    def _base(self) -> int:
        return int((self._options.prefetch_multiplier or 4) * self._slots)

    @property
    def _slots(self) -> int:
        """How many calls may run at a time, with an autoscaler at most."""
        return self._options.autoscale[0] if self._options.autoscale else self._pool.size

    def _wanted(self, base: int) -> int:
        """Return how many messages may be here now, those that wait for their time not counted."""
        core = self._core
        if self._beside:
            # Twice as many as run there, and some to begin with: sources that are asked for messages are asked for more
            # when half of the window is free.
            base += 2 * min(core.outstanding_beside(), self._beside) + FIRST_BESIDE
        if not (core.reliable and self._options.adapts_prefetch and core.run_ns >= 0):
            return base
        per_child = min(MOST, WORK_NS / max(core.run_ns, 1.0))
        return max(base, min(MOST, int(per_child * self._slots)))

    async def adapt(self, consumer: Consumer) -> None:
        """Widen the window while tasks are short or waiting ETA tasks fill it; narrow it when tasks are long."""
        core = self._core
        base = current = self.size
        pause_s, grown_at = ADAPT_EVERY_S, -HOLD_S
        counted = parked = shelved = 0  # as they were when the window was set: those do not fill it
        received = received_at_first = core.received
        while True:
            await asyncio.sleep(pause_s)
            now, pause_s = time.monotonic(), ADAPT_EVERY_S
            scheduled = core.stats()["scheduled"]
            unsaved, is_full = 0, False
            if not isinstance(consumer.source, BatchSource):
                # The broker counts what has run and waits for a result store that is away. How much of it came since
                # this subscription is not known: when as much waits as may be here and nothing comes, it may be all.
                unsaved, received, before = consumer.source.shelved, core.received, received
                scheduled += unsaved
                is_full = unsaved >= current > 0 and received == before != received_at_first
            is_asked, base = self.size != base, self.size
            wanted = self._wanted(base)
            parked, shelved = min(parked, core.parked), min(shelved, unsaved)
            filled = core.scheduled_since(counted) + core.parked - parked + unsaved - shelved
            grown = (filled >= current // 2 > 0 or is_full) and scheduled < self._max_scheduled
            if grown:
                # As many again as came, and looked at soon, so that a flood of them is through before it is due.
                wanted += min(scheduled, MOST)
                grown_at, pause_s = now, GROW_EVERY_S
            elif not is_asked and wanted * 4 <= current and now - grown_at < HOLD_S:
                continue  # the flood may go on
            # What runs in the children for coroutine functions holds its place: all that is above is room for more.
            rises = bool(self._beside) and wanted > current
            if rises:
                pause_s = GROW_EVERY_S
            if grown or rises or is_asked or wanted >= 2 * current or wanted * 4 <= current:
                # A new consumer's window counts from zero: what waits for its time does not fill it.
                current, counted, parked, shelved = wanted, core.scheduled_count, core.parked, unsaved
                received_at_first = core.received
                consumer.source.window = wanted + scheduled
                try:
                    await consumer.set_prefetch(wanted)
                except FastqError:
                    return  # the connection has ended; ``lost`` says why
