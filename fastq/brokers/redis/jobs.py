"""What takes several calls on a worker's connection to Redis, beside its batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

from fastq.brokers.redis.login import PASSING_CODES
from fastq.brokers.redis.url import RedisUrl
from fastq.errors import ConnectionLost, RedisError

logger = logging.getLogger("fastq.transport.redis")

P = ParamSpec("P")
T = TypeVar("T")

RETRY_S: Final = 1.0  # chosen: what the server refuses for now is tried again so often


class Jobs:
    """Coroutines that run on their own; the failure of one ends the connection, by ``fail``."""

    def __init__(self, place: RedisUrl, fail: Callable[[Exception], None]) -> None:
        self._place = place
        self.fail = fail
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._warned: dict[str, float] = {}

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that takes several calls."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def patiently(self, work: Callable[P, Awaitable[T]], *arguments: P.args, **options: P.kwargs) -> T:
        """Return what the work returns; done again as long as the server refuses it for now."""
        while True:
            try:
                return await work(*arguments, **options)
            except RedisError as error:
                if error.code not in PASSING_CODES:
                    raise
                self.warn(f"Redis at {self._place} refuses for now: {error}")
                await asyncio.sleep(RETRY_S)

    async def done(self) -> None:
        """Return when all have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()

    def warn(self, text: str) -> None:
        """Log what goes wrong, the same at most once a minute."""
        now = self._loop.time()
        if now - self._warned.get(text, -60.0) >= 60.0:
            self._warned = {text: now}
            logger.error("%s", text)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, (ConnectionLost, RedisError)):
                raise error
            self.fail(error)
