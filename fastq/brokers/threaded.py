"""A publisher that blocks, used from an event loop: all it does is done in one thread, in the order of the calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastq.net.threads import Threads

if TYPE_CHECKING:
    from fastq.interfaces import Publisher
    from fastq.wire.message import Message


class ThreadedPublisher:
    """AsyncPublisher over a Publisher (both are protocols of ``interfaces``)."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._thread = Threads(1, "fastq-publisher")

    async def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Publish in the thread; who is cancelled before it has begun has sent nothing."""
        await self._thread.run(partial(self._publisher.publish, messages, deadline))

    async def declare(self, queue: str, deadline: float | None = None) -> None:
        """Declare in the thread."""
        await self._thread.run(partial(self._publisher.declare, queue, deadline))

    async def close(self) -> None:
        """Close the publisher; a later call opens it again."""
        await self._thread.run(self._publisher.close)
