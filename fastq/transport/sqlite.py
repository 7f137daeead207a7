"""The embedded broker: messages in a SQLite file, for any number of producers and workers on one machine.

Cold halves only: what a worker does with the file happens in ``sqlite_thread``, the statements are in ``sqlite_tables``,
the file itself in ``fastq.embedded``. A message's queue is its routing key; exchanges mean nothing here.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastq.embedded import database
from fastq.embedded.bells import BellFolder
from fastq.embedded.database import patiently
from fastq.errors import ConnectionLost, PublishError, SettingsError
from fastq.link import BatchSource
from fastq.transport import sqlite_tables as tables
from fastq.transport.sqlite_tables import QueueIds, WorkerInfo
from fastq.transport.sqlite_thread import Outcome, SaveItem, SqliteThread, Work

if TYPE_CHECKING:
    from fastq._core import Core
    from fastq.settings import Settings
    from fastq.wire.message import Message

T = TypeVar("T")

STALE_S = 1.0
LOST_TURN_S = 0.001


class SqlitePublisher:
    """Publishes from any thread. A publish returns when its transaction is on the disk."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._location = database.parse_url(url)
        self._timeout_s = settings.fastq_publish_timeout
        self._max_message_bytes = settings.fastq_max_message_bytes
        self._lock = threading.Lock()
        self._file: _OpenFile | None = None
        _publishers.add(self)

    def publish(self, messages: Sequence[Message]) -> None:
        """Store the messages in one transaction and wake the workers."""
        for message in messages:
            if len(message.body) + len(message.props) > self._max_message_bytes:
                raise PublishError(
                    f"message {message.id} has {len(message.body)} bytes, the limit is {self._max_message_bytes}: raise "
                    "fastq_max_message_bytes, or pass a reference to the data instead"
                )
        with self._lock:
            self._use(lambda file: file.insert(messages, self._timeout_s))

    def declare(self, queue: str) -> None:
        """Create the queue if it is missing."""
        with self._lock:
            self._use(lambda file: file.transaction(partial(file.queue_ids.declare, queue), self._timeout_s))

    def purge(self, queue: str) -> int:
        """Drop the messages that wait in a queue, delayed ones too, and return how many there were."""

        def purge(file: _OpenFile) -> int:
            return file.transaction(lambda: tables.purge(file.cursor, file.queue_ids.declare(queue)), self._timeout_s)

        with self._lock:
            return self._use(purge)

    def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, delayed ones too."""
        with self._lock:
            return self._use(lambda file: patiently(partial(tables.depth_of, file.cursor, queue), self._timeout_s))

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _use(self, action: Callable[[_OpenFile], T]) -> T:
        """Return what the action returns on the open file; every failure becomes a PublishError with the remedy."""
        path = self._location.path
        try:
            file = self._file
            if file is None or file.is_stale():
                if file is not None:
                    file.close()
                    self._file = None
                file = self._file = _OpenFile(self._location, self._timeout_s)
            return action(file)
        except sqlite3.OperationalError as error:
            if not database.is_busy(error) and self._file is not None:
                self._file.close()
                self._file = None
            raise PublishError(f"not published: {database.explain(path, error)}") from error
        except sqlite3.DatabaseError as error:
            raise PublishError(f"not published: {database.explain(path, error)}") from error
        except (ConnectionLost, SettingsError) as error:
            raise PublishError(f"not published: {error}") from error

    def _after_fork(self) -> None:
        # Neither used nor closed: SQLite forbids both with a connection that came over a fork.
        self._lock = threading.Lock()
        if self._file is not None:
            _kept_from_parents.append(self._file)
            self._file = None


class _OpenFile:
    """A publisher's connection, its queue numbers and its bells."""

    def __init__(self, location: database.Location, timeout_s: float) -> None:
        self._path = location.path
        self._identity = (0, 0)
        self._checked_at = time.monotonic()
        self._connection = database.connect(location.path, location.synchronous, timeout_s)
        try:
            self._folder = BellFolder(location.path)
        except BaseException:
            self._connection.close()
            raise
        self._identity = database.identity(location.path)
        self.cursor = self._connection.cursor()
        self.queue_ids = QueueIds(self.cursor)

    def is_stale(self) -> bool:
        """Return whether the file at our path is another one than the one we have open; looked at once a second."""
        now = time.monotonic()
        if now - self._checked_at < STALE_S:
            return False
        self._checked_at = now
        return database.identity(self._path) != self._identity

    def insert(self, messages: Sequence[Message], timeout_s: float) -> None:
        """Store messages and ring."""
        known = [self.queue_ids.get(message.routing_key) for message in messages]
        if len(messages) == 1 and known[0] is not None:
            # One statement is a transaction by itself.
            row = tables.message_row(known[0], messages[0])
            patiently(partial(self.cursor.execute, tables.INSERT_MESSAGE, row), timeout_s)
        else:
            self.transaction(partial(self._insert_all, messages), timeout_s)
        self._folder.ring_workers()

    def _insert_all(self, messages: Sequence[Message]) -> None:
        declare = self.queue_ids.declare
        rows = [tables.message_row(declare(message.routing_key), message) for message in messages]
        self.cursor.executemany(tables.INSERT_MESSAGE, rows)

    def transaction(self, write: Callable[[], T], timeout_s: float) -> T:
        """Write, commit and return what ``write`` returns; nothing of it remains when anything is raised."""
        patiently(partial(self.cursor.execute, "BEGIN IMMEDIATE"), timeout_s)
        try:
            result = write()
            self.cursor.execute("COMMIT")
        except BaseException:
            self.queue_ids.forget()
            if self._connection.in_transaction:
                self.cursor.execute("ROLLBACK")
            raise
        return result

    def close(self) -> None:
        """Close everything."""
        self._folder.close()
        self._connection.close()


class SqliteSource(BatchSource):
    """The hot half: batches from the core to the thread and back. Runs on the loop's thread."""

    def __init__(self, thread: SqliteThread) -> None:
        super().__init__()
        self._thread = thread
        self._taken = 0

    def pull(self, n: int) -> None:
        """Allow ``n`` more deliveries, those included that are on their way here."""
        self._thread.allow(self._taken + n)

    def settle(self, batch: list[tuple[int, int]]) -> None:
        """Tell the verdicts on deliveries."""
        self._thread.post(Work(verdicts=batch))

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
            self.receive(outcome.rows)


class SqliteConsumer:
    """A worker's side of the file. Without ``consume`` it only stores results and publishes: a result store for any broker."""

    source: SqliteSource
    outlet: SqliteSource
    lost: asyncio.Future[Exception]

    def __init__(self, url: str, settings: Settings, core: Core | None = None) -> None:
        self._location = database.parse_url(url)
        self._settings = settings
        self._core = core
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
        self.source = self.outlet = self.make_source(self._thread)
        self._thread.start()
        await asyncio.wrap_future(self._thread.opened)

    def make_source(self, thread: SqliteThread) -> SqliteSource:
        """Return the hot half."""
        return SqliteSource(thread)

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
        while self._thread.is_alive():
            await asyncio.sleep(LOST_TURN_S)


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
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        pass  # the loop is closed: nobody is left to hear it


def _set(future: asyncio.Future[Exception], error: Exception) -> None:
    if not future.done():
        future.set_result(error)


_publishers: weakref.WeakSet[SqlitePublisher] = weakref.WeakSet()
_kept_from_parents: list[_OpenFile] = []


def _after_fork() -> None:
    for publisher in list(_publishers):
        publisher._after_fork()


os.register_at_fork(after_in_child=_after_fork)
