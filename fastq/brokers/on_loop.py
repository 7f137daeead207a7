"""Publishing from an event loop: one connection, made when it is needed and again when it is lost. No protocol.

A ``Line`` is one connection and those who wait for answers on it; a broker derives its own, and ``LoopPublisher``
has one at a time. Nothing is tried again here: ConnectionLost says that nothing was sent, PublishError that the fate is
bad or unknown, and which messages are to be sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastq.brokers.limits import check_sizes
from fastq.errors import ConnectionLost, FastqError

if TYPE_CHECKING:
    from fastq.settings import Settings
    from fastq.wire.message import Message

T = TypeVar("T")


class Wait:
    """Somebody who waits for the answers to their messages: ``answered`` is done when there is one for each."""

    __slots__ = ("answered", "messages", "span_s", "until")

    def __init__(self, messages: Sequence[Message], answered: asyncio.Future[None]) -> None:
        self.messages = messages
        self.answered = answered
        #: When (monotonic) it has waited for too long, and how long that is.
        self.until = self.span_s = 0.0

    def fail(self, error: BaseException) -> None:
        """End the wait with an error."""
        if not self.answered.done():
            self.answered.set_exception(error)


W = TypeVar("W", bound=Wait)


class Line(Generic[W]):
    """One connection on the running loop, and who waits on it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waits: set[W] = set()
        # One for all, at the first time that is over: most waits are answered long before theirs.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closing: asyncio.Task[None] | None = None
        #: An answer did not come in time: what is published from now on had better go over another connection.
        self.is_doubtful = False

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        raise NotImplementedError

    async def publish(self, messages: Sequence[Message], until: float) -> None:
        """Return when the broker has confirmed the messages; ``until`` is monotonic."""
        raise NotImplementedError

    async def declare(self, queue: str, until: float) -> None:
        """Create a queue if it is missing."""
        raise NotImplementedError

    async def close(self) -> None:
        """Say goodbye and close."""
        raise NotImplementedError

    def is_late(self, wait: W) -> FastqError | None:
        """Return the error for answers that did not come in time; None where some came: as long again is waited."""
        raise NotImplementedError

    def lost_error(self, wait: W, error: Exception) -> FastqError:
        """Return what a wait ends with when the connection ends with an error."""
        raise NotImplementedError

    async def wait(self, wait: W, until: float) -> None:
        """Return when a wait is answered; raise what it has failed with."""
        wait.until, wait.span_s = until, until - time.monotonic()
        self._waits.add(wait)
        if until < self._timer_at:
            self._look_at(until)
        try:
            await wait.answered
        finally:
            self._waits.discard(wait)
            if self.is_doubtful:
                self._leave()

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_later(max(when - time.monotonic(), 0.0), self._look_for_late)

    def _look_for_late(self) -> None:
        # Both kinds of loop read what has come before this is called, also after they stood still.
        self._timer, self._timer_at = None, math.inf
        now = time.monotonic()
        for wait in list(self._waits):
            if wait.until <= now and not wait.answered.done():
                error = self.is_late(wait)
                if error is None:
                    wait.until = now + wait.span_s
                else:
                    self.is_doubtful = True
                    wait.fail(error)
        # Who has failed is still here until their turn has come.
        if due := [wait.until for wait in self._waits if not wait.answered.done()]:
            self._look_at(min(due))

    def _leave(self) -> None:
        """Close what nobody uses any more, once nobody waits on it either."""
        if not self._waits and self._closing is None and not self.is_lost:
            self._closing = self._loop.create_task(self.close())

    def on_lost(self, lost: asyncio.Future[Exception]) -> None:
        """The connection has ended: tell all who wait."""
        if self._timer is not None:
            self._timer.cancel()
        for wait in list(self._waits):
            wait.fail(self.lost_error(wait, lost.result()))


class LoopPublisher:
    """AsyncPublisher over lines (the protocol is ``interfaces.AsyncPublisher``). For one event loop."""

    def __init__(
        self, connect: Callable[[], Coroutine[Any, Any, Line[Any]]], place: object, settings: Settings
    ) -> None:
        self._connect = connect
        self._place = place
        self._timeout_s = settings.fastq_publish_timeout
        self._max_message_bytes = settings.fastq_max_message_bytes
        self._line: Line[Any] | None = None
        self._lines: list[Line[Any]] = []  # the doubtful ones too
        self._connecting: asyncio.Task[Line[Any]] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._place}>"

    async def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Return when the broker has confirmed every message.

        Raises PublishError, ConnectionLost when there is no broker, SettingsError when trying again cannot help.
        """
        check_sizes(messages, self._max_message_bytes)
        until = time.monotonic() + self._timeout_s if deadline is None else deadline
        line = self._line
        if line is None or line.is_lost or line.is_doubtful:
            line = await self._connected(until)
        if messages:
            await line.publish(messages, until)

    async def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing. Raises SettingsError when it exists with other arguments."""
        until = time.monotonic() + self._timeout_s if deadline is None else deadline
        line = self._line
        if line is None or line.is_lost or line.is_doubtful:
            line = await self._connected(until)
        await line.declare(queue, until)

    async def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait([connecting])
        lines, self._lines, self._line = self._lines, [], None
        for line in lines:
            with contextlib.suppress(FastqError):
                await line.close()

    async def _connected(self, until: float) -> Line[Any]:
        """Return a line that all who need one now share."""
        connecting = self._connecting
        if connecting is None:
            connecting = self._connecting = asyncio.get_running_loop().create_task(self._connect())
            connecting.add_done_callback(self._keep)
        return await in_time(connecting, until, f"cannot connect to {self._place}")

    def _keep(self, connecting: asyncio.Task[Line[Any]]) -> None:
        if self._connecting is connecting:
            self._connecting = None
        if connecting.cancelled() or connecting.exception() is not None:
            return
        self._line = connecting.result()
        self._lines = [line for line in self._lines if not line.is_lost]
        self._lines.append(self._line)


async def in_time(task: asyncio.Task[T], until: float, what: str) -> T:
    """Return what a task returns that others may wait for too: it goes on when the time (monotonic) is over.

    Raises ConnectionLost then, else a copy of the task's error.
    """
    await asyncio.wait([task], timeout=max(until - time.monotonic(), 0.0))
    if not task.done() or task.cancelled():
        raise ConnectionLost(f"{what}: {'it was closed' if task.done() else 'time-out'}. Is it running?")
    error = task.exception()
    if error is not None:
        raise copy.copy(error)
    return task.result()
