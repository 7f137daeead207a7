"""Whom to look for when, by the clock: those who wait for results, and the times to look for them. Does not look."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from fastq.errors import FastqError
    from fastq.interfaces import Meta
    from fastq.results.leading import Signal

#: How a wait ends.
Outcome: TypeAlias = "Meta | FastqError"


class Waiter:
    """Somebody who waits for one result; with a callback, the thread waits for them.

    Who ``observes`` is told of the states before the last one too.
    """

    __slots__ = ("callback", "look_at", "observes", "outcome", "pause_s", "seen", "signal", "task_id")

    def __init__(
        self,
        task_id: str,
        signal: Signal,
        pause_s: float,
        callback: Callable[[Meta], None] | None = None,
        observes: bool = False,
    ) -> None:
        self.task_id = task_id
        self.signal = signal
        self.callback = callback
        self.outcome: Outcome | None = None
        self.observes = observes
        #: The last state that an observer was told of: one that is looked for is found again and again.
        self.seen: Meta | None = None
        #: When to look for the result (monotonic), and the pause that led there.
        self.look_at = math.inf
        self.pause_s = pause_s


class Agenda:
    """Plans, by time. Not thread-safe, but for ``next_at``. Who waits no longer sets ``look_at`` to infinity."""

    def __init__(self) -> None:
        #: When somebody is to be looked for next (monotonic).
        self.next_at = math.inf
        self._plans: list[tuple[float, int, Waiter]] = []
        self._numbers = count()

    def plan(self, waiter: Waiter, when: float) -> None:
        """Look for a waiter at a time, in place of another time."""
        plans = self._plans
        while plans and plans[0][2].look_at != plans[0][0]:
            heapq.heappop(plans)
        waiter.look_at = when
        heapq.heappush(plans, (when, next(self._numbers), waiter))
        self.next_at = plans[0][0]

    def take_due(self, now: float) -> list[Waiter]:
        """Return and forget those who are due, or nearly: looked for together they stay together."""
        plans, due = self._plans, []
        while plans and plans[0][0] - plans[0][2].pause_s / 4 <= now:
            when, _, waiter = heapq.heappop(plans)
            if waiter.look_at == when:
                waiter.look_at = math.inf
                due.append(waiter)
        self.next_at = plans[0][0] if plans else math.inf
        return due
