"""Whether a worker is to stop, how, and within what time. What a stop consists of is the life's affair."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class Stop:
    """Whether the worker is to stop, how, and within what time; the last wish counts unless it is the softer one."""

    def __init__(self) -> None:
        self.how = ""
        self.limit_s: float | None = None
        self.restarts = False
        self.loop: asyncio.AbstractEventLoop
        self._asked: asyncio.Event
        self._over: asyncio.Event
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to this loop from now on."""
        self.loop = loop
        self._asked = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def asked(self) -> bool:
        """Return whether a stop was asked for."""
        return self._asked.is_set()

    @property
    def is_over(self) -> bool:
        """Return whether running calls have had their time."""
        return self._over.is_set()

    def ask(self, how: str, limit_s: float | None) -> None:
        """Ask for a stop, "warm" or "cold", that lets running calls end for so many seconds; None: for any time."""
        if how == "warm" and self.how:
            return
        self.how, self.limit_s = how, limit_s
        self._asked.set()
        if self._timer is not None:
            self._timer.cancel()
        if limit_s:
            self._timer = self.loop.call_later(limit_s, self._over.set)
        elif limit_s is not None:
            self._over.set()

    def fail(self, error: Exception, limit_s: float = 0) -> None:
        """Stop because of an error, which ``check`` raises at the end."""
        self._error = error
        self.ask("cold", limit_s)

    def check(self) -> None:
        """Raise the error that ended the worker, if one did."""
        if self._error is not None:
            raise self._error

    async def wait(self) -> None:
        """Return once a stop was asked for."""
        await self._asked.wait()

    async def until_over(self) -> None:
        """Return once running calls have had their time."""
        await self._over.wait()

    async def unless(self, work: Coroutine[None, None, None]) -> None:
        """Do the work, or stop doing it when a stop is asked for."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if task.done():
            task.result()
        else:
            task.cancel()
