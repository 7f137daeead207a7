"""The worker's connection to its result store, where that is not the broker's own: made, watched, made again.

A store that is away stops nothing. What is to be stored meanwhile the message loop keeps, up to 64 MiB with the
messages of the tasks (``BatchSource.keep_result``), and hands to the next connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from fastq.errors import ConnectionLost, FastqError, SettingsError
from fastq.link import BatchSource
from fastq.net.urls import mask_url
from fastq.results import open_saver

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.interfaces import Saver
    from fastq.settings import Settings

logger = logging.getLogger("fastq.worker")

FIRST_RETRY_S: Final = 0.1  # reliability goals, scenario 29: 0.1 to 10 s
LAST_RETRY_S: Final = 10.0
LOOK_EVERY_S: Final = 0.2  # chosen: a result that was not confirmed between two looks stands in nobody's way
REMIND_EVERY_S: Final = 60.0


class Storage:
    """Keeps a worker's result store connected. Raises SettingsError for a URL where results cannot be stored."""

    def __init__(self, url: str, settings: Settings, core: Core, hostname: str) -> None:
        self._url = url
        self._settings = settings
        self._core = core
        self._hostname = hostname
        self._saver: Saver | None = None
        self._task: asyncio.Task[None] | None = None
        self._down_since = 0.0
        self._reminded_at = 0.0
        self._make()

    def start(self, on_fatal: Callable[[FastqError], None]) -> None:
        """Connect in the background; until that has succeeded results are kept."""
        shelf = BatchSource()
        shelf.bury()
        self._core.set_store(shelf)
        self._task = asyncio.ensure_future(self._serve())
        self._task.add_done_callback(lambda task: self._on_end(task, on_fatal))

    async def close(self) -> None:
        """Have what was handed over stored, if the store answers, and close the connection."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._saver is not None:
            await self._saver.close()

    def _make(self) -> Saver:
        saver = open_saver(self._url, self._settings, self._core)
        saver.name = self._hostname
        return saver

    async def _serve(self) -> None:
        attempt = 0
        while True:
            saver, began = self._make(), time.monotonic()
            try:
                await saver.open()
            except (ConnectionLost, SettingsError) as error:
                # Refused logins too: somebody may be about to mend them, and tasks without results need no store.
                self._complain(error)
            else:
                await self._use(saver)
            attempt = attempt + 1 if time.monotonic() - began < LAST_RETRY_S else 1
            longest = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(attempt, 16))
            await asyncio.sleep(random.uniform(FIRST_RETRY_S, longest))  # noqa: S311  jitter, not a secret

    async def _use(self, saver: Saver) -> None:
        """Store results there until the connection is lost."""
        saver.source.window = 0
        self._saver = saver
        self._core.set_store(saver.source)
        if self._down_since:
            logger.warning("results can be stored at %s again", mask_url(self._url))
            self._down_since = 0.0
        while not saver.lost.done():
            await asyncio.wait([saver.lost], timeout=LOOK_EVERY_S)
            self._core.look_at_store()
        self._core.lose_store()
        self._saver = None
        self._complain(saver.lost.result())
        await saver.close()

    def _on_end(self, task: asyncio.Task[None], on_fatal: Callable[[FastqError], None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_fatal(FastqError(f"the result store at {mask_url(self._url)} failed: {error!r}"))

    def _complain(self, error: Exception) -> None:
        now = time.monotonic()
        self._down_since = self._down_since or now
        if self._down_since == now or now - self._reminded_at >= REMIND_EVERY_S:
            self._reminded_at = now
            logger.error(
                "Results cannot be stored at %s: %s. Tasks run on; up to 64 MiB of results are kept until they can",
                mask_url(self._url),
                error,
            )
