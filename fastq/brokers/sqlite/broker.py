"""The embedded broker: messages in a SQLite file, for any number of producers and workers on one machine.

Cold halves only: what a worker does with the file happens in ``thread``, the statements are in
``tables``, the file itself in ``database``. A message's queue is its routing key; exchanges mean nothing
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastq.brokers.fixed import FixedQueues
from fastq.brokers.limits import check_sizes
from fastq.brokers.sqlite import database, tables
from fastq.brokers.sqlite.bells import BellFolder
from fastq.brokers.sqlite.client import FileClient, OpenFile
from fastq.brokers.sqlite.database import patiently
from fastq.brokers.sqlite.results import SaveItem
from fastq.brokers.sqlite.tables import QueueIds, WorkerInfo
from fastq.brokers.sqlite.thread import REJECT, UNSTORABLE, Outcome, SqliteThread, Work
from fastq.errors import ConnectionLost, PublishError, SettingsError
from fastq.link import BatchSource

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.settings import Settings
    from fastq.wire.message import Message

T = TypeVar("T")


class SqlitePublisher:
    """Publishes from any thread. A publish returns when its transaction is on the disk."""

    def __init__(self, url: str, settings: Settings) -> None:
        location = database.parse_url(url)
        self._client = FileClient(location, location.synchronous, settings.fastq_publish_timeout)
        self._max_message_bytes = settings.fastq_max_message_bytes
        self._queue_ids = QueueIds()
        self._file: OpenFile | None = None

    def publish(self, messages: Sequence[Message], deadline: float | None = None) -> None:
        """Store the messages in one transaction and wake the workers."""
        check_sizes(messages, self._max_message_bytes)
        self._use(partial(self._insert, messages))

    def declare(self, queue: str, deadline: float | None = None) -> None:
        """Create the queue if it is missing."""
        self._use(lambda file: file.transaction(partial(self._queue_ids.declare, file.cursor, queue)))

    def purge(self, queue: str) -> int:
        """Drop the messages that wait in a queue, delayed ones too, and return how many there were."""
        return self._use(lambda file: file.transaction(partial(tables.purge, file.cursor, queue)))

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, delayed ones too."""
        return self._use(lambda file: tables.depth(file.cursor, queue))

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        self._client.close()

    def _insert(self, messages: Sequence[Message], file: OpenFile) -> None:
        queue = self._queue_ids.get(messages[0].routing_key) if len(messages) == 1 else None
        if queue is not None:
            file.execute(tables.INSERT_MESSAGE, tables.message_row(queue, messages[0]))
        else:
            file.transaction(partial(self._insert_all, messages, file))
        file.folder.ring_workers()

    def _insert_all(self, messages: Sequence[Message], file: OpenFile) -> None:
        declare = partial(self._queue_ids.declare, file.cursor)
        rows = [tables.message_row(declare(message.routing_key), message) for message in messages]
        file.cursor.executemany(tables.INSERT_MESSAGE, rows)

    def _use(self, action: Callable[[OpenFile], T]) -> T:
        """Return what the action returns; every failure becomes a PublishError with the remedy."""
        try:
            return self._client.use(partial(self._with_queue_ids, action))
        except sqlite3.Error as error:
            raise PublishError(f"not published: {database.explain(self._client.path, error)}") from error
        except UNSTORABLE as error:
            raise PublishError(f"not published: the message cannot be stored ({error})") from error
        except (ConnectionLost, SettingsError) as error:
            raise PublishError(f"not published: {error}") from error

    def _with_queue_ids(self, action: Callable[[OpenFile], T], file: OpenFile) -> T:
        """Return what the action returns; queue numbers hold for one file, and a rollback may have undone a new one."""
        if file is not self._file:
            self._file = file
            self._queue_ids.forget()
        try:
            return action(file)
        except BaseException:
            self._queue_ids.forget()
            raise


class SqliteSource(BatchSource):
    """The hot half: batches from the core to the thread and back. Runs on the loop's thread."""

    def __init__(self, thread: SqliteThread) -> None:
        super().__init__()
        self._thread = thread
        self._taken = self._taken_bytes = 0

    def pull(self, n: int) -> None:
        """Allow ``n`` more deliveries, those included that are on their way here."""
        self._thread.allow(self._taken + n, self._taken_bytes + self.max_held_bytes - self.held_bytes)

    def settle(self, batch: list[tuple[int, int]]) -> None:
        """Tell the verdicts on deliveries."""
        rejected = self.take_reasons([tag for tag, verdict in batch if verdict == REJECT])
        self._thread.post(Work(verdicts=batch, rejected=list(rejected.items())))

    def save(self, batch: list[SaveItem]) -> None:
        """Store results."""
        self._thread.post(Work(saves=batch))

    def publish(self, batch: list[tuple[int, Message]]) -> None:
        """Store messages."""
        self._thread.post(Work(messages=batch))

    def take(self, outcome: Outcome) -> None:
        """Hand what a turn has brought to the core."""
        if self.dead:
            return
        if outcome.stored:
            self.published(outcome.stored)
        if outcome.refused:
            self.publish_failed(outcome.refused, outcome.refusal)
        if outcome.rows:
            self._taken += len(outcome.rows)
            self._taken_bytes += sum(map(tables.size_of, outcome.rows))
            self.receive(outcome.rows)


class SqliteConsumer(FixedQueues):
    """A worker's side of the file. One that does not ``consume`` still publishes and stores results."""

    source: SqliteSource
    outlet: SqliteSource
    lost: asyncio.Future[Exception]
    source_class = SqliteSource
    saves_results = True
    replies = None

    def __init__(self, url: str, settings: Settings, core: Core | None = None) -> None:
        self._location = database.parse_url(url)
        self._settings = settings
        #: Under this name the worker is listed; set it before ``consume``.
        self.name = f"fastq@{socket.gethostname()}"
        self._thread: SqliteThread

    async def open(self) -> None:
        """Open the file and start the thread that works on it."""
        loop = asyncio.get_running_loop()
        self.lost = loop.create_future()
        self._thread = SqliteThread(
            self._location, self._settings,
            report=lambda outcome: _tell(loop, self.source.take, outcome),
            fail=lambda error: _tell(loop, _set, self.lost, error),
        )  # fmt: skip
        self.source = self.outlet = self.source_class(self._thread)
        self._thread.start()
        try:
            await asyncio.wrap_future(self._thread.opened)
        except BaseException:
            self._thread.stop()
            raise

    async def consume(self, queues: Sequence[str], prefetch: int) -> None:
        """Join the file's workers and receive from the queues, which are created when missing."""
        self.source.window = prefetch
        info = WorkerInfo(0, self.name, socket.gethostname(), os.getpid(), "", (), time.time())
        await asyncio.wrap_future(self._thread.ask(partial(self._thread.enter, info, tuple(queues))))
        self.source.pull(prefetch)

    async def set_prefetch(self, prefetch: int) -> None:
        """Change how many unsettled messages may be here; the core asks for them by itself."""
        self.source.window = prefetch

    async def cancel(self) -> None:
        """Stop receiving; what was claimed has been received when this returns."""
        await asyncio.wrap_future(self._thread.ask(self._thread.quiet))

    async def close(self) -> None:
        """Settle what was handed over, give back the rest, close the file."""
        self._thread.stop()
        await asyncio.wrap_future(self._thread.ended)


def live_workers(url: str) -> list[WorkerInfo]:
    """Return the workers that have the file open, by start. Raises SettingsError or ConnectionLost."""
    location = database.parse_url(url)
    if not os.path.exists(location.path):
        return []
    connection = database.connect(location.path, "NORMAL")
    try:
        folder = BellFolder(location.path)
        try:
            workers = patiently(lambda: tables.all_workers(connection.cursor()), 10.0)
            return [worker for worker in workers if folder.is_alive(worker.bell)]
        finally:
            folder.close()
    except sqlite3.Error as error:
        raise database.refusal(location.path, error) from error
    finally:
        connection.close()


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
        loop.call_soon_threadsafe(callback, *args)


def _set(future: asyncio.Future[Exception], error: Exception) -> None:
    if not future.done():
        future.set_result(error)
