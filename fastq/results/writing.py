"""A worker's results into a store whose client blocks: batches from the loop to one thread, and back what is stored.

No protocol: how results are written is up to a store's ``Writer``. It does not reconnect; ``lost`` says when somebody
should, and what was not confirmed by then is handed over again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from fastq.errors import ConnectionLost, FastqError
from fastq.link import BatchSource

if TYPE_CHECKING:
    from fastq.interfaces import SaveItem

logger = logging.getLogger("fastq.results")

#: Chosen: results that are written at once, and their bytes (one may be larger); an error costs one write for each.
MAX_BATCH: Final = 500
MAX_BATCH_BYTES: Final = 4 << 20
#: Chosen: a store that does not take the last results within this is not waited for when a worker stops.
CLOSE_S: Final = 2.0


class Writer:
    """How results are written, as one store knows it. All is called from one thread and may block."""

    def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""

    def store_many(self, results: Sequence[SaveItem]) -> None:
        """Store results in this order, each in the place of an earlier one of its task; some may be there already.

        Raises ConnectionLost when they are to be stored again on another connection, another FastqError when one of
        them can never be stored: then they are tried one by one.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what ``open`` has made."""


class WrittenResults(BatchSource):
    """The hot half: hands batches to the thread. Brings no deliveries. Runs on the loop's thread."""

    def __init__(self, post: Callable[[list[SaveItem]], None]) -> None:
        super().__init__()
        self._post = post

    def pull(self, n: int) -> None:
        """Do nothing: there is nothing to receive here."""

    def save(self, batch: list[SaveItem]) -> None:
        """Store results; the ones with a token are confirmed when the store has them."""
        self._post(batch)


class WritingSaver:
    """Saver over a writer (the protocol is ``interfaces.Saver``)."""

    source: WrittenResults
    lost: asyncio.Future[Exception]
    source_class = WrittenResults

    def __init__(self, writer: Writer) -> None:
        #: The worker's node name.
        self.name = ""
        self._writer = writer
        self._thread: _WriterThread

    async def open(self) -> None:
        """Connect. Raises ConnectionLost (try again) or SettingsError (do not)."""
        loop = asyncio.get_running_loop()

        def tell(callback: Callable[..., object], *args: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                loop.call_soon_threadsafe(callback, *args)

        self.lost = loop.create_future()
        self._thread = _WriterThread(
            self._writer,
            on_stored=lambda tokens: tell(self._confirm, tokens),
            on_lost=lambda error: tell(self._lose, error),
        )
        self.source = self.source_class(self._thread.inbox.put)
        self._thread.start()
        try:
            await asyncio.wrap_future(self._thread.opened)
        except BaseException:
            self._thread.inbox.put(None)
            raise

    async def close(self) -> None:
        """Have what was handed over stored, if the store takes it in time, and close the connection."""
        self._thread.inbox.put(None)
        await asyncio.wait([asyncio.wrap_future(self._thread.ended)], timeout=CLOSE_S)

    def _confirm(self, tokens: list[int]) -> None:
        if not self.source.dead:
            self.source.published(tokens)

    def _lose(self, error: Exception) -> None:
        if not self.lost.done():
            self.lost.set_result(error)


class _WriterThread(threading.Thread):
    """Writes what is put into ``inbox`` until that is None. Both callbacks are called on this thread."""

    def __init__(
        self, writer: Writer, on_stored: Callable[[list[int]], None], on_lost: Callable[[Exception], None]
    ) -> None:
        super().__init__(name="fastq-results-writer", daemon=True)
        self._writer = writer
        self._on_stored = on_stored
        self._on_lost = on_lost
        self._is_ending = False
        # Not bounded here: the core keeps no more unconfirmed results than BatchSource allows.
        self.inbox: SimpleQueue[list[SaveItem] | None] = SimpleQueue()
        self.opened: Future[None] = Future()
        self.ended: Future[None] = Future()

    def run(self) -> None:
        """Connect; then write until the end, or until the store is lost."""
        # From here on neither can be cancelled by somebody who has stopped waiting for it.
        is_awaited = self.opened.set_running_or_notify_cancel()
        self.ended.set_running_or_notify_cancel()
        if is_awaited:
            try:
                self._writer.open()
            except BaseException as error:
                self.opened.set_exception(error)
            else:
                self.opened.set_result(None)
                self._serve()
        self.ended.set_result(None)

    def _serve(self) -> None:
        try:
            while not self._is_ending:
                for part in parts_of(self._gather()):
                    self._store(part)
                    if tokens := [token for *_, token in part if token]:
                        self._on_stored(tokens)
        except FastqError as error:
            self._on_lost(error)
        except Exception as error:
            logger.exception("the thread that writes results failed")
            self._on_lost(ConnectionLost(f"results cannot be written: {error!r}"))
        finally:
            self._writer.close()

    def _gather(self) -> list[SaveItem]:
        """Return all that has been handed over since the last time, or wait for it."""
        gathered: list[SaveItem] = []
        while True:
            batch = self.inbox.get()
            if batch is None:
                self._is_ending = True
                return gathered
            gathered += batch
            if self.inbox.empty():
                return gathered

    def _store(self, part: list[SaveItem]) -> None:
        try:
            self._writer.store_many(part)
        except ConnectionLost:
            raise
        except FastqError as error:
            if len(part) == 1:
                # Neither another attempt nor another run of the task would help.
                logger.error("the result of task %r cannot be stored, and is lost: %s", part[0][0], error)
                return
            for item in part:
                self._store([item])


def parts_of(results: list[SaveItem]) -> Iterator[list[SaveItem]]:
    """Yield results in order, in parts of bounded number and size, one result at least."""
    part: list[SaveItem] = []
    size = 0
    for item in results:
        size += len(item[2])
        if part and (len(part) >= MAX_BATCH or size > MAX_BATCH_BYTES):
            yield part
            part, size = [], len(item[2])
        part.append(item)
    if part:
        yield part
