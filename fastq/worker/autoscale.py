"""Keeping the pool's size between two bounds: it grows with what waits at once, and shrinks when little was to do.

Source of the rules and of the variable AUTOSCALE_KEEPALIVE: Celery's autoscaler.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Protocol

from fastq.errors import SettingsError

logger = logging.getLogger("fastq.worker")

EVERY_S = 1.0
KEEPALIVE_S = 30.0
KEEPALIVE_VARIABLE = "AUTOSCALE_KEEPALIVE"


class Pool(Protocol):
    """What is scaled."""

    @property
    def size(self) -> int:
        """Return how many calls can run at a time."""

    def grow(self, n: int = 1) -> None:
        """Add processes."""

    def shrink(self, n: int = 1) -> None:
        """Remove processes."""


class Core(Protocol):
    """What says how much there is to do."""

    @property
    def load(self) -> int:
        """Return how many calls run or wait for a child."""


class Autoscaler:
    """Scales a pool between ``min`` and ``max`` processes; Celery's 0 means that one is left, as a pool needs one."""

    def __init__(self, pool: Pool, core: Core, bounds: tuple[int, int]) -> None:
        self.max, self.min = bounds
        self._pool = pool
        self._core = core
        self._keepalive_s = _keepalive_s()
        self._grown_at = time.monotonic()

    async def run(self) -> None:
        """Look at the load every second, until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.step()

    def step(self) -> None:
        """Grow to what waits, shrink when nothing has needed the last growth for a while."""
        size = self._pool.size
        wanted = min(max(self._core.load, self.min, 1), self.max)
        if wanted > size:
            self._grown_at = time.monotonic()
            logger.info("Scaling up %s processes.", wanted - size)
            self._pool.grow(wanted - size)
        elif wanted < size and time.monotonic() - self._grown_at >= self._keepalive_s:
            logger.info("Scaling down %s processes.", size - wanted)
            self._pool.shrink(size - wanted)

    def set(self, max: int | None, min: int | None) -> tuple[int, int]:
        """Change the bounds that are given and return both, the upper one first. Raises ValueError."""
        most = self.max if max is None else max
        least = self.min if min is None else min
        if least < 0 or most < 1 or least > most:
            raise ValueError(f"max={most} min={least}: expected 0 <= min <= max, and max at least 1")
        self.max, self.min = most, least
        size = self._pool.size
        if size > most:
            self._pool.shrink(size - most)
        elif size < least:
            self._pool.grow(least - size)
        return most, least


def _keepalive_s() -> float:
    text = os.environ.get(KEEPALIVE_VARIABLE)
    if not text:
        return KEEPALIVE_S
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{KEEPALIVE_VARIABLE} is {text!r}; expected seconds") from None
